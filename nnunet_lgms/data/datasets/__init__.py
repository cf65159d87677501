"""One module a dataset, each with its `DESCRIPTION`."""

from nnunet_lgms.data.datasets import (
    btcv,
    bus,
    busi,
    cvc300,
    cvc_clinicdb,
    cvc_colondb,
    etis,
    isic2018,
    kits23,
    kvasir,
    ph2,
    stu,
    tnscui,
)
from nnunet_lgms.data.description import DatasetDescription

DESCRIPTIONS: dict[str, DatasetDescription] = {
    module.DESCRIPTION.name: module.DESCRIPTION
    for module in (
        # trained on in the paper
        *(busi, tnscui, isic2018, kvasir, btcv, kits23),
        # unseen
        *(bus, stu, ph2, cvc_clinicdb, cvc_colondb, cvc300, etis),
    )
}
"""Descriptions by the name that users type."""
