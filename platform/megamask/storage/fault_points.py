"""Named moments between two actions, at which a test may kill the process or make an action fail.

In production nothing is ever armed, and `reached` is one look into an empty list. No variable, setting or
argument arms a point: only code in the same process can, and only tests do.

Names are `<what>.<done>`, in the past: "checkpoint.flushed" lies right after the flush. The functions of
`storage.durable` name theirs after the file, so the moments of a commit are "COMMIT.json.written",
"COMMIT.json.linked" and so on.
"""

from __future__ import annotations

from collections.abc import Callable

Follower = Callable[[str], object]

_followers: list[Follower] = []


def reached(name: str) -> None:
    """Call the followers with the name of this point; a follower may kill the process, raise or wait."""
    for follower in _followers:
        follower(name)


def arm(name: str, action: Callable[[], object]) -> None:
    """Call `action` every time the point of this name is reached, until `disarm`."""
    follow(lambda point: action() if point == name else None)


def follow(follower: Follower) -> None:
    """Call `follower` with the name of every point that is reached, in any thread, until `disarm`."""
    _followers.append(follower)


def disarm() -> None:
    """Remove all followers."""
    _followers.clear()
