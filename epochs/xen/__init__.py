"""Domains of Xen. Nothing here needs Xen's libraries until a domain is touched."""
