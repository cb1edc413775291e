#!/usr/bin/env bash
# Run an image of this project as yourself, so that the files it writes belong to you.
set -euo pipefail

usage() {
    cat <<'END'
usage: docker/run.sh [-d GPUS] [-j] [-x] [-o DIR] [-m DIR] [-i IMAGE] [--dry-run] [-h] [--] [ARGUMENTS]

Run the trainer's image as yourself. ARGUMENTS go to mnist.py: docker/run.sh -d 0 --epochs 5

  -d GPUS    all, none, or numbers such as 0 or 2,3 (default: all, or none where nvidia-smi finds none)
  -j         open the tutorial in JupyterLab instead, in this very folder; ARGUMENTS are another command
  -x         show windows on your X11 display; with -j, matplotlib's for example
  -o DIR     takes results, and in DIR/home what programs keep in a home folder (default: output)
  -m DIR     holds other data than the image's own; it is mounted as /app/datasets
  -i IMAGE   (default: mnist, with -j mnist-notebook)
  --dry-run  print the command instead of running it; put mnist.py's own --dry-run behind --
  -h         print this

ENGINE=podman takes another engine than docker, PORT=8889 another port than 8888 for JupyterLab.
END
}

fail() {
    echo "run.sh: $1" >&2
    exit 2
}

engine=${ENGINE:-docker} port=${PORT:-8888}
gpus='' image='' data='' output=output jupyter='' windows='' dry_run=''
while [ $# -gt 0 ]; do
    case $1 in
        -d | -o | -m | -i) [ -n "${2:-}" ] || fail "$1 needs a value: run.sh -h explains" ;;
    esac
    case $1 in
        -d) gpus=$2 && shift ;;
        -o) output=$2 && shift ;;
        -m) data=$2 && shift ;;
        -i) image=$2 && shift ;;
        -j) jupyter=yes ;;
        -x) windows=yes ;;
        --dry-run) dry_run=yes ;;
        -h | --help) usage && exit ;;
        --) shift && break ;;
        *) break ;;
    esac
    shift
done

# An engine needs full paths, and would create a missing folder as root.
absolute() {
    case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
}
output=$(absolute "$output")
[ -n "$dry_run" ] || mkdir -p "$output/home" || fail "cannot make $output/home"
[ -z "$data" ] || [ -d "$data" ] || fail "$data is not a folder"

command=("$engine" run --rm --user "$(id -u):$(id -g)" --stop-timeout 30)
command+=(--env "USER=${USER:-$(id -u)}" --env HOME=/app/output/home)
[ ! -t 0 ] || [ ! -t 1 ] || command+=(--interactive --tty)

if [ -n "$jupyter" ]; then
    command+=(--volume "$(cd "$(dirname "$0")/.." && pwd):/app" --publish "127.0.0.1:$port:8888")
fi
command+=(--volume "$output:/app/output")
[ -z "$data" ] || command+=(--volume "$(absolute "$data"):/app/datasets")

[ -n "$gpus" ] || { nvidia-smi --list-gpus >/dev/null 2>&1 && gpus=all; } || gpus=none
[[ $gpus =~ ^(all|none|[0-9]+(,[0-9]+)*)$ ]] || fail "-d $gpus: use all, none, or numbers such as 0 or 2,3"
case $(basename "$engine"):$gpus in
    *:none) ;;
    podman*:*) for gpu in ${gpus//,/ }; do command+=(--device "nvidia.com/gpu=$gpu"); done ;;
    *:all) command+=(--gpus all) ;;
    *) command+=(--gpus "\"device=$gpus\"") ;; # the inner quotes stop docker from splitting at the comma
esac
# Without root, podman would number users differently inside. This keeps your own number.
if [[ $(basename "$engine") == podman* && $(id -u) != 0 ]]; then command+=(--userns keep-id); fi

if [ -n "$windows" ]; then
    [ -n "${DISPLAY:-}" ] || fail "-x needs a display, and DISPLAY is not set"
    command+=(--env DISPLAY --volume /tmp/.X11-unix:/tmp/.X11-unix)
    # If the display asks for a key, the key is stored under this machine's name.
    if [ -r "${XAUTHORITY:-$HOME/.Xauthority}" ]; then
        command+=(--hostname "$(uname -n)" --env XAUTHORITY=/tmp/.Xauthority)
        command+=(--volume "${XAUTHORITY:-$HOME/.Xauthority}:/tmp/.Xauthority:ro")
    fi
fi

command+=("${image:-mnist${jupyter:+-notebook}}" "$@")
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
