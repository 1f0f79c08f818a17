"""``import-xen`` and ``export-xen``: files of `xl save` become epochs, and epochs such files."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import memsave
from epochs import points
from epochs.catalog import EpochRecord, JournalRecord, MachineRecord
from epochs.durable import make_directory, remove_tree, sync_directory
from epochs.errors import Failed, NotFound, Refused
from epochs.hypervisor import Progress, no_progress
from epochs.protocol import verify
from epochs.protocol.create import checksum, memory_figures
from epochs.protocol.journal import operation
from epochs.spec import XEN, MachineSpec, check_name
from epochs.store import StoreFiles, new_id
from epochs.xen.config import DomainConfig
from memsave.xen import State, XenDomain, XenStreamError, XlSave, xlfile


def import_file(store: StoreFiles, path: Path, *, name: str | None = None, message: str = "",
                disks: Mapping[str, tuple[str, str]] | None = None,
                progress: Progress = no_progress) -> EpochRecord:
    """An epoch of no machine, out of a file of `xl save`. ``disks``: name of a disk of the domain
    to (epoch, disk) whose frozen layer it had at that time; without, the epoch has no disks.

    Refused if the file is malformed, or of a domain that cannot be taken.
    """
    began = time.perf_counter()
    with store.shared():
        layers = {disk: _layer(store, *where) for disk, where in (disks or {}).items()}
        plan = {"epoch": new_id(), "pack": new_id()}
        with operation(store, "import-xen", None, plan, undo_import) as under_way:
            points.hit("import-xen.intended")
            make_directory(store.epoch_dir(plan["epoch"]))
            with XenDomain(store.packs_dir) as domain, \
                    memsave.PackStore(store.packs_dir) as packs:
                saved = _read(path, domain)
                config = DomainConfig.parse(saved.config)
                for disk in layers:
                    config.disk(disk)
                progress("reading", 1, 2)
                check_name(name or config.name)
                state = State.of(domain, saved.config, saved.libxl)
                written = domain.write_image(None, packs, plan["pack"])
                signature = packs.signature(plan["pack"]) if written.pack_id else None
                version = domain.version
            progress("writing", 2, 2)
            points.hit("import-xen.memory-written")
            epoch = written_epoch(
                store, plan["epoch"], state, written, compatibility(config, version),
                MachineRecord(new_id(), name or config.name, MachineSpec(
                    memory=config.memory, cpus=config.cpus, net="none", hypervisor=XEN),
                    time.time(), "", "", XEN, None), message,
                {**NO_PAUSE, "total_seconds": time.perf_counter() - began})
            with store.catalog.transaction():
                if signature is not None:
                    store.catalog.add_pack(plan["pack"], signature)
                store.catalog.add_epoch(epoch, layers, written.image.packs)
                under_way.end()
    return epoch


def compatibility(config: DomainConfig, version: tuple[int, int]) -> dict[str, Any]:
    """What a Xen host must offer, under the names of docs/json.md."""
    return {"hypervisor": XEN, "xen": "{}.{}".format(*version), "guest": config.kind,
            "cpus": config.cpus, "memory": config.memory, "page_size": memsave.PAGE}


# Of a file, under the names of docs/json.md.
NO_PAUSE = {
    "pause_seconds": 0.0, "pause_steps": {}, "short_stops_seconds": [], "pages_sealed_in_pause": 0,
    "pages_precopied": 0, "disk_bytes": {}, "tracking": "stream",
}


def write_files(store: StoreFiles, epoch_id: str, state: State, image: memsave.Image) -> None:
    """Write an epoch's state and map durably into its directory, which is there."""
    state.save(store.state_file(epoch_id))
    image.save(store.map_file(epoch_id))
    sync_directory(store.epoch_dir(epoch_id))
    sync_directory(store.epoch_dir(epoch_id).parent)


def written_epoch(store: StoreFiles, epoch_id: str, state: State, written: memsave.WriteResult,
                  compatible: dict[str, Any], machine: MachineRecord, message: str,
                  stats: dict[str, Any]) -> EpochRecord:
    """Write an epoch's files durably into its directory, which is there, beside the pack that is
    written already; returns its row, without a parent, recorded nowhere yet."""
    write_files(store, epoch_id, state, written.image)
    map_bytes = store.map_file(epoch_id).read_bytes()
    state_bytes = store.state_file(epoch_id).read_bytes()
    return EpochRecord(
        id=epoch_id, machine=machine.id, machine_name=machine.name, parent=None,
        created=time.time(), message=message, spec=machine.spec, compatibility=compatible,
        map_checksum=checksum(map_bytes), state_checksum=checksum(state_bytes),
        state_size=len(state_bytes), thumbnail=False,
        stats={**memory_figures(written), **stats, "map_bytes": len(map_bytes),
               "state_bytes": len(state_bytes)})


def _layer(store: StoreFiles, epoch_id: str, disk: str) -> str:
    layers = store.catalog.epoch_layers(epoch_id)
    if disk not in layers:
        raise NotFound(f"epoch {epoch_id[:12]} has no disk '{disk}'; it has "
                       + (", ".join(layers) or "none"))
    return layers[disk]


def _read(path: Path, domain: XenDomain) -> XlSave:
    try:
        with path.open("rb", buffering=0) as file:
            saved = xlfile.read(file.fileno(), domain)
            if file.read(1):
                raise XenStreamError("something follows behind its end")
            return saved
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except XenStreamError as error:
        raise Refused(f"{path} cannot be imported: {error}") from error
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error


def undo_import(store: StoreFiles, record: JournalRecord) -> None:
    """Remove what an unfinished import made."""
    remove_tree(store.epoch_dir(record.plan["epoch"]))
    memsave.PackStore(store.packs_dir).drop(record.plan["pack"])
    with store.catalog.transaction():
        store.catalog.end(record.id)


def export_file(store: StoreFiles, epoch: EpochRecord, path: Path, *, force: bool = False) -> int:
    """Write an epoch of a domain as a file that `xl restore` takes; returns its size in bytes. Its
    disks are not in it: `xl restore` finds those that the configuration names.

    The file appears whole or not at all, readable by its owner alone: it holds the guest's secrets.
    """
    if epoch.spec.hypervisor != XEN:
        raise Refused(f"epoch {epoch.id[:12]} is not of a Xen domain; only those can be exported")
    if path.exists() and not force:
        raise Refused(f"{path} exists; choose another name or overwrite it with --force")
    path = path.absolute()
    partial = path.with_name(f"{path.name}.{new_id()}.partial")
    with store.shared():
        verify.before_use(store, epoch)
        with operation(store, "export-xen", None, {"partial": str(partial)},
                       undo_export) as under_way:
            try:
                fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise Refused(f"{path} cannot be written: {error.strerror}") from error
            try:
                with XenDomain(store.packs_dir) as domain:
                    saved = load(store, epoch.id, domain)
                    xlfile.write(fd, domain, saved)
                os.fsync(fd)
                size = os.fstat(fd).st_size
                points.hit("export-xen.written")
                partial.rename(path)
                sync_directory(path.parent)
            except OSError as error:
                raise Failed(f"{path} was not written: {error.strerror}") from error
            finally:
                os.close(fd)
            under_way.end()
    return size


def undo_export(store: StoreFiles, record: JournalRecord) -> None:
    """Remove the unfinished file; what was renamed already is whole."""
    Path(record.plan["partial"]).unlink(missing_ok=True)
    with store.catalog.transaction():
        store.catalog.end(record.id)


def load(store: StoreFiles, epoch_id: str, domain: XenDomain) -> XlSave:
    """Fill an empty domain from an epoch; returns what else its file holds."""
    state = State.load(store.state_file(epoch_id))
    state.fill(domain)
    with memsave.PackStore(store.packs_dir) as packs:
        domain.load_image(memsave.Image.load(store.map_file(epoch_id)), packs)
    return XlSave(state.config, state.libxl)
