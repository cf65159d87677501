"""The one requirement worth a sentence of its own: nnU-Net, present and new enough.

`import nnunet_lgms.nnunet` calls :func:`require_nnunetv2` before anything of nnunetv2 is imported, so that an older
nnU-Net is named as such and does not surface as an ImportError from deep inside.
"""

from importlib.metadata import PackageNotFoundError, version

MINIMUM_NNUNETV2 = "2.8"


class RequirementError(ImportError):
    """A package that the plugin stands on is missing or too old; the message is one sentence with the way out."""


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
