"""A torch module as `fastvi.estimate_llc` takes it, differentiated by torch's own autograd."""

from fastvi.integrations.torch.loss import torch_loss as torch_loss
