"""Domains of Xen: the streams that hold them, and their canonical image (docs/xen-image.md).

::

    with XenDomain(spool) as domain, open("web.save", "rb", buffering=0) as file:
        saved = xlfile.read(file.fileno(), domain)     # what `xl save` wrote
        result = domain.write_image(None, packs, "first")
        saved.state(domain).save(path)

:mod:`memsave.xen.live` captures running domains; it is there only where Xen's libraries are.
"""

from memsave.errors import XenStreamError
from memsave.xen.domain import XenDomain
from memsave.xen.state import State
from memsave.xen.xlfile import XlSave

__all__ = ["State", "XenDomain", "XenStreamError", "XlSave"]
