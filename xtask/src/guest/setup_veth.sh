# Two RDMA devices on the two ends of a virtual cable, both in the one network namespace which rxe knows.
#
# rxe looks routes up for its own interface, so its packets do cross the cable, although either address is local and
# ordinary sockets would use lo. What arrives then has one of our own addresses as its source: accept_local lets it in,
# ARP included, and rp_filter must not object. Nothing here is lost when a test takes a link down and up again.
ip link set lo up
ip link add veth0 type veth peer name veth1
echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
for i in 0 1; do
    # Room for a 4096-byte RoCE MTU with its headers.
    ip link set "veth$i" mtu 4200
    ip address add "10.78.0.$((i + 1))/24" dev "veth$i"
    ip link set "veth$i" up
    echo 1 >"/proc/sys/net/ipv4/conf/veth$i/accept_local"
    echo 0 >"/proc/sys/net/ipv4/conf/veth$i/rp_filter"
    # Each interface answers for its own address only.
    echo 1 >"/proc/sys/net/ipv4/conf/veth$i/arp_ignore"
done
for i in 0 1; do
    rdma link add "rxe$i" type rxe netdev "veth$i"
done
. /out/.guest/wait_for_gids.sh
wait_for_gids rxe0 rxe1
