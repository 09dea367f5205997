"""Variables that a network between nodes demands of NCCL and gloo, and no others.

Tuning and debugging variables are the site's (/etc/nccl.conf) or the user's (`launch.environment`), which come last.
Reference: NCCL user guide, environment variables; AWS OFI NCCL plugin.
"""

from __future__ import annotations

from collections.abc import Mapping

_FABRICS: Mapping[str, Mapping[str, str]] = {
    "infiniband": {},
    "roce": {"NCCL_IB_GID_INDEX": "3"},  # RoCE v2 over IPv4
    "efa": {"FI_PROVIDER": "efa"},
    "tcp": {"NCCL_IB_DISABLE": "1"},
}


def fabric_environment(fabric: str | None, interface: str | None) -> dict[str, str]:
    """Return the variables of a fabric; `interface` is where ranks of different nodes meet."""
    variables = dict(_FABRICS[fabric]) if fabric is not None else {}
    if interface is not None:
        variables |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}  # = is an exact match
    return variables
