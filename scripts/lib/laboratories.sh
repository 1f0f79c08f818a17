# Sourced by what runs the laboratories: what they take from the host.
# shellcheck shell=bash

need_uml() {
    need user-mode-linux kmod lvm2 dmsetup thin-provisioning-tools e2fsprogs util-linux fdisk iproute2
    if EPOCHS_UML=$("$ROOT/scripts/guests/build-uml"); then
        export EPOCHS_UML
    else
        unset EPOCHS_UML
        say "User-Mode Linux is Debian 12's then, which takes up to three times as long"
    fi
}

need_xen() {
    need qemu-system-x86 util-linux
    EPOCHS_XEN=$("$ROOT/scripts/guests/build-xen")
    EPOCHS_XEN_WHEEL=$("$ROOT/scripts/guests/build-xen-wheel" "$EPOCHS_XEN")
    export EPOCHS_XEN EPOCHS_XEN_WHEEL
}
