"""A small run over real processes that are killed, cut off, lied to by the wire and out of disk; then the same run in peace.

plan          the small plan, and the devices' data
faults        what happens to the bytes of a connection, drawn from a seed
proxy         the connections between devices and coordinator, through those faults
coordinator   the real coordinator, with a wall clock that can be set
house         the processes: started, killed, started again
moments       instants that are worth a kill
disturb       the kills, the full disks and the clock's jumps of one run
disks         small file systems for state folders, and filling them
left          what a run left behind, and where that differs from another
run           one run, disturbed or not
"""
