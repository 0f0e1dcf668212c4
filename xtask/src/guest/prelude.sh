# Functions for the scripts which run in a guest.

# wait_for_tcp HOST PORT [SECONDS]: until something accepts connections there.
wait_for_tcp() {
    local deadline=$((SECONDS + ${3:-60}))
    until (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; do
        if ((SECONDS >= deadline)); then
            echo "nothing accepts connections at $1:$2" >&2
            return 1
        fi
        sleep 0.5
    done
}

# wait_for_listener PORT [SECONDS]: as above on this guest, without connecting (perftest serves one connection only).
wait_for_listener() {
    local deadline=$((SECONDS + ${2:-60}))
    until ss --listening --tcp --numeric --no-header "sport = :$1" | grep --quiet .; do
        if ((SECONDS >= deadline)); then
            echo "nothing listens on port $1" >&2
            return 1
        fi
        sleep 0.2
    done
}

# serve_until_stopped COMMAND…: runs a server until the group has finished. Success when it ended because of that;
# the server's own status when it ended before.
serve_until_stopped() {
    "$@" &
    local server=$!
    while kill -0 "$server" 2>/dev/null; do
        if [ -e /out/.guest/stop ]; then
            kill -TERM "$server"
            wait "$server"
            local status=$?
            case $status in 0 | 143) return 0 ;; *) return "$status" ;; esac
        fi
        sleep 0.5
    done
    wait "$server"
}
