# Sourced by the scripts of this folder: what they share. Nothing here runs a training.

_checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

# die MESSAGE: one line on stderr, and the status of a user's mistake.
die() {
    echo "error: $1" >&2
    exit 2
}

# check_arguments USAGE "$@": the first two must be a number of processes and a folder to save to.
check_arguments() {
    local usage="usage: $1"
    shift
    if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ || -z $2 || $2 == -* || $2 =~ ^[+~]*[A-Za-z_]+(\.[A-Za-z_]+)+= ]]; then
        echo "$usage" >&2
        exit 2
    fi
}

# find_command NAME: prints a command of this project, from PATH or from the checkout's .venv.
find_command() {
    if type -P "$1"; then
        return
    fi
    if [[ -x $_checkout/.venv/bin/$1 ]]; then
        echo "$_checkout/.venv/bin/$1"
        return
    fi
    die "$1 is neither on PATH nor in the checkout's .venv: run 'make setup' there, or activate your environment"
}

# hydra_string TEXT: prints TEXT quoted as the value of a Hydra override, whatever characters it has.
hydra_string() {
    local text=${1//\\/\\\\}
    echo "'${text//\'/\\\'}'"
}
