# One RDMA device per network card: rxe0 on 10.77.0.INDEX, rxe1 on 10.77.1.INDEX, …
ip link set lo up
devices=()
for card in /sys/class/net/eth*; do
    name=${card##*/}
    rail=${name#eth}
    # Room for a 4096-byte RoCE MTU with its headers.
    ip link set "$name" mtu 4200
    ip address add "10.77.$rail.$KVPUSH_GUEST_INDEX/24" dev "$name"
    ip link set "$name" up
    rdma link add "rxe$rail" type rxe netdev "$name"
    devices+=("rxe$rail")
done
. /out/.guest/wait_for_gids.sh
wait_for_gids "${devices[@]}"
