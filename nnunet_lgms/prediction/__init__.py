"""Prediction of whole cases with any model of nnU-Net v2: nnU-Net's numbers in less time and memory.

``nnunet_lgms predict``, :func:`nnunet_lgms.predict`, the zero-shot tests and the validation at the end of a training go
through :class:`nnunet_lgms.prediction.predictor.Predictor`, which is nnU-Net's predictor with other machinery. A case
is read while another one is in the network and a third one is being written, in threads. Images are resampled by matrix
products. Logits go from the sliding window to labels of the image's size in slabs, so that no array of (classes, image)
is ever there.
"""
