"""A disk as Windows has it, as far as Linux can show it."""

import os
from collections.abc import Callable


class WindowsDisk:
    """Removes and replaces no file that this process has open."""

    def functions(self) -> dict[str, Callable]:
        """Of the module os, by their names."""
        return {name: self._unless_open(getattr(os, name)) for name in ("replace", "rename", "unlink", "remove")}

    @staticmethod
    def _unless_open(function: Callable) -> Callable:
        def call(*paths, **options):
            taken = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
            with open("/proc/self/maps") as maps:
                taken |= {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
            for path in paths:
                if "dir_fd" not in options and os.path.realpath(path) in taken:
                    raise PermissionError(13, "it is being used by another process", str(path))
            return function(*paths, **options)

        return call
