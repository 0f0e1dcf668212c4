# Two RDMA devices on the two ends of a virtual cable, both in the one network namespace which rxe knows.
#
# Left alone, the kernel would notice that either address is its own and send packets over lo, where no rxe device
# listens. So the table of local addresses is asked last for what the devices send, and the neighbours are given.
# That holds for IPv4 GIDs; the link-local IPv6 ones do not reach each other.
ip link set lo up
ip link add veth0 type veth peer name veth1
for i in 0 1; do
    # Room for a 4096-byte RoCE MTU with its headers.
    ip link set "veth$i" mtu 4200
    ip address add "10.78.0.$((i + 1))/24" dev "veth$i"
    ip link set "veth$i" up
    echo 1 >"/proc/sys/net/ipv4/conf/veth$i/accept_local"
    echo 0 >"/proc/sys/net/ipv4/conf/veth$i/rp_filter"
done
echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
for i in 0 1; do
    peer=$((1 - i))
    ip route add "10.78.0.$((peer + 1))" dev "veth$i" table $((100 + i))
    ip rule add pref $((10 + i)) oif "veth$i" lookup $((100 + i))
    ip neighbour replace "10.78.0.$((peer + 1))" dev "veth$i" nud permanent lladdr "$(cat "/sys/class/net/veth$peer/address")"
done
ip rule add pref 100 lookup local
ip rule delete pref 0 lookup local

for i in 0 1; do
    rdma link add "rxe$i" type rxe netdev "veth$i"
done
. /out/.guest/wait_for_gids.sh
wait_for_gids rxe0 rxe1
