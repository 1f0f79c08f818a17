"""The QEMU driver: command line, process, QMP, RAM blocks, device state, guest agent."""
