"""``python -m nnunet_lgms`` is ``nnunet_lgms``."""

from nnunet_lgms.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
