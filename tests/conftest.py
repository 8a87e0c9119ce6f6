"""One thread for all tests: tiny models gain nothing from a second one, and lose much to it on a busy machine."""

import torch

torch.set_num_threads(1)
