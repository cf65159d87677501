"""What this package stands on, and the line to type where something of it is missing.

`import nnunet_lgms.nnunet` calls :func:`require_nnunetv2` before anything of nnunetv2 is imported, so that an older
nnU-Net is named as such and does not surface as an ImportError from deep inside.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from nnunet_lgms.files import one_line

MINIMUM_NNUNETV2 = "2.8"


class RequirementError(ImportError):
    """A package that the plugin stands on is missing or too old; the message is one sentence with the way out."""


@contextmanager
def needs(what: str, packages: Sequence[str], extra: str) -> Iterator[None]:
    """Around imports: what is not installed is told from what is and cannot be loaded.

    Args:
        what: what needs them, first word of the sentence.
        packages: names as they are imported.
        extra: of this package, that has them.

    Raises:
        RequirementError: a package is not installed, or the block's imports fail.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise RequirementError(f"{what} needs {', '.join(missing)}: {install_extra(extra)}")
    try:
        yield
    except ImportError as error:
        if isinstance(error, RequirementError):
            raise
        raise RequirementError(
            f"{what} needs {', '.join(packages)}, of which one is installed and cannot be loaded ({one_line(error)}): "
            "allow more memory if that is limited (ulimit -v), or install it anew."
        ) from error


def require_nnunetv2() -> str:
    """The installed version of nnunetv2.

    Raises:
        RequirementError: nnunetv2 is not installed, or older than ``MINIMUM_NNUNETV2``.
    """
    # a dependency of setuptools, pip and matplotlib alike; imported here so that `import nnunet_lgms` stays cheap
    from packaging.version import Version

    way_out = f"pip install --upgrade 'nnunetv2>={MINIMUM_NNUNETV2}'"
    try:
        found = version("nnunetv2")
    except PackageNotFoundError:
        raise RequirementError(
            f"nnunet_lgms needs nnunetv2 {MINIMUM_NNUNETV2} or newer, which is not installed: {way_out}"
        ) from None
    if Version(found) < Version(MINIMUM_NNUNETV2):
        raise RequirementError(f"nnunet_lgms needs nnunetv2 {MINIMUM_NNUNETV2} or newer, found {found}: {way_out}")
    return found


def install_extra(extra: str) -> str:
    """The line that installs what is missing of an extra: no index has this package, but all have its requirements.

    They are those of the installed package's own metadata; in a checkout that is not installed, the line is pip's for
    the folder.
    """
    try:
        listed = requires("nnunet-lgms") or []
    except PackageNotFoundError:
        return f"pip install '.[{extra}]' in the folder that nnunet_lgms comes from"
    marked = [line.partition(";")[::2] for line in listed]
    wanted = [name.strip() for name, marker in marked if re.search(rf"extra == ['\"]{extra}['\"]", marker)]
    missing = [requirement for requirement in wanted if not _is_installed(requirement)]
    return f"pip install {shlex.join(missing or wanted)}"


def _is_installed(requirement: str) -> bool:
    try:
        version(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
    except PackageNotFoundError:
        return False
    return True
