"""A switch whose wires are long: it hands frames on from port to port after a while.

python benchmarks/scale/delay.py SECONDS PORT…        in the network namespace of the ports, as root

Linux delays packets with netem, where the kernel has it; this serves where it has not. A port is the near
end of a host's cable, taken off its bridge. It prints "ready", and runs until it is stopped.
"""

import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

SOL_PACKET, PACKET_VNET_HDR, EVERY_PROTOCOL = 263, 15, 3
HEADER = 10  # virtio's, ahead of a frame: with it, 64 KB of a stream pass as one frame, as on a bridge
BUFFER = 64 << 20


def open_port(name):
    """Return a socket that sees, and sends, the frames of a port."""
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EVERY_PROTOCOL))
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    for option in (33, 32):  # SO_RCVBUFFORCE, SO_SNDBUFFORCE: more than an ordinary user may have
        port.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    port.bind((name, EVERY_PROTOCOL))
    port.setblocking(False)
    return port


def serve(ports, seconds):
    """Hand each frame on after so many seconds: to where its receiver was last heard, or else to all."""
    heard, waiting = {}, deque()  # addresses and their ports; (when, frame, the port that it came from)
    while True:
        left = max(0, waiting[0][0] - time.monotonic()) if waiting else None
        for port in select.select(ports, [], [], left)[0]:
            with suppress(BlockingIOError):  # once all is read
                while True:
                    frame, (_, _, kind, *_) = port.recvfrom(1 << 17)
                    if kind == socket.PACKET_OUTGOING:
                        continue  # sent by ourselves
                    waiting.append((time.monotonic() + seconds, frame, port))
                    heard[frame[HEADER + 6 : HEADER + 12]] = port
        while waiting and waiting[0][0] <= time.monotonic():
            _, frame, origin = waiting.popleft()
            receiver = heard.get(frame[HEADER : HEADER + 6])
            for port in [receiver] if receiver else ports:
                if port is not origin:
                    with suppress(BlockingIOError):  # its queue is full: lost, as on a real switch
                        port.send(frame)


if __name__ == "__main__":
    opened = [open_port(name) for name in sys.argv[2:]]
    print("ready", flush=True)
    serve(opened, float(sys.argv[1]))
