#!/usr/bin/env bash
# Run an image of this project as yourself, so that the files it writes belong to you.
set -euo pipefail
unset CDPATH # with it, cd prints where it goes

usage() {
    cat <<'END'
usage: docker/run.sh [-d GPUS] [-j] [-x] [-o DIR] [-m DIR] [-i IMAGE] [--dry-run] [-h] [--] [ARGUMENTS]

Run the trainer's image as yourself. ARGUMENTS go to mnist.py: docker/run.sh -d 0 --epochs 5

  -d GPUS    all, none, or numbers such as 0 or 2,3 (default: those that a batch system has given you, or
             else all, or none where nvidia-smi finds none)
  -j         open the tutorial in JupyterLab instead, in its own folder; ARGUMENTS are another command
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
[ -z "$data" ] || [ -d "$data" ] || fail "$data is not a folder"

# The program says what it is: docker may be podman's name, too. Who you are in a container depends on it.
user=$(id -u):$(id -g) userns=''
version=$("$engine" --version 2>/dev/null) || version=$engine
case $version in
    *[Pp]odman*)
        podman=yes
        # Without root, it would number users differently inside. This keeps your own number.
        [ "$(id -u)" = 0 ] || userns=keep-id
        ;;
    *)
        podman=''
        case $("$engine" info --format '{{.SecurityOptions}}' 2>/dev/null || true) in
            *name=rootless*) user=0:0 ;;   # its root is yourself
            *name=userns*) userns=host ;; # it would number users differently
        esac
        ;;
esac
command=("$engine" run --rm --user "$user" --stop-timeout 30)
[ -z "$userns" ] || command+=(--userns "$userns")
command+=(--env "USER=${USER:-$(id -u)}" --env HOME=/app/output/home)
[ ! -t 0 ] || [ ! -t 1 ] || command+=(--interactive --tty)

mount() {
    case $1 in *:*) fail "$1 cannot be mounted, because its name has a colon" ;; esac
    command+=(--volume "$1:$2")
}
[ -z "$jupyter" ] || mount "$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)" /app
mount "$output" /app/output
[ -z "$data" ] || mount "$(absolute "$data")" /app/datasets

# Slurm's own variables have the numbers that an engine knows, CUDA's perhaps those within the job.
if [ -z "$gpus" ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=${SLURM_STEP_GPUS:-${SLURM_JOB_GPUS:-${CUDA_VISIBLE_DEVICES:-none}}}
    case $gpus in -1 | NoDevFiles) gpus=none ;; esac
fi
[ -n "$gpus" ] || { nvidia-smi --list-gpus >/dev/null 2>&1 && gpus=all; } || gpus=none
card='([0-9]+|(GPU|MIG)-[-0-9a-f]+)'
[[ $gpus =~ ^(all|none|$card(,$card)*)$ ]] || fail "-d $gpus: use all, none, or numbers such as 0 or 2,3"
case $podman:$gpus in
    *:none) ;;
    yes:*) for gpu in ${gpus//,/ }; do command+=(--device "nvidia.com/gpu=$gpu"); done ;;
    *:all) command+=(--gpus all) ;;
    *) command+=(--gpus "\"device=$gpus\"") ;; # the inner quotes stop docker from splitting at the comma
esac

network=''
if [ -n "$windows" ]; then
    [ -n "${DISPLAY:-}" ] || fail "-x needs a display, and DISPLAY is not set"
    command+=(--env DISPLAY)
    mount /tmp/.X11-unix /tmp/.X11-unix
    # The display that ssh makes is a port of this machine.
    case $DISPLAY in :* | unix:*) ;; *) network=host && command+=(--network host) ;; esac
    # If the display asks for a key, the key is stored under this machine's name.
    key=${XAUTHORITY:-$HOME/.Xauthority}
    if [ -r "$key" ]; then
        command+=(--hostname "$(uname -n)" --env XAUTHORITY=/tmp/.Xauthority)
        mount "$key" /tmp/.Xauthority:ro
    fi
fi

if [ -n "$jupyter" ] && [ -z "$network" ]; then
    command+=(--publish "127.0.0.1:$port:8888")
elif [ -n "$jupyter" ] && [ $# = 0 ]; then
    set -- jupyter lab --ip=127.0.0.1 --port="$port" --no-browser
fi
command+=("${image:-mnist${jupyter:+-notebook}}" "$@")
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
mkdir -p "$output/home" || fail "cannot make $output/home"
for folder in "$output" "$output/home"; do
    [ -w "$folder" ] || fail "$folder belongs to $(stat -c %U "$folder"), and you cannot write there"
done
exec "${command[@]}"
