# wait_for_gids DEVICE…: the kernel fills GID tables in the background; until each port is active and has an IPv4 GID.
wait_for_gids() {
    local device tries
    for device in "$@"; do
        for ((tries = 0; ; tries++)); do
            if grep --quiet ACTIVE "/sys/class/infiniband/$device/ports/1/state" &&
                cat "/sys/class/infiniband/$device/ports/1/gids/"[0-7] 2>/dev/null |
                grep --quiet '^0000:0000:0000:0000:0000:ffff:'; then
                break
            fi
            if ((tries == 150)); then
                echo "$device has no active port with an IPv4 GID after 30 s" >&2
                return 1
            fi
            sleep 0.2
        done
    done
}
