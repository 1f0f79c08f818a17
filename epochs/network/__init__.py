"""Isolated networks: each machine in a network namespace of its own, with bridge, tap and NAT.

Inside, every guest keeps the MAC and the address that its memory remembers, as they are the same in
all namespaces; from the host each is reached at an address of its own, that of its namespace's end
of a pair of interfaces. ``plan`` is pure, ``rules`` the text for nft, ``namespaces`` the kernel's
side, ``isolated`` what the QEMU driver calls.
"""
