"""What each task trains towards: from outputs and targets to a scalar, a mean over samples.

One that looks at the batch as a whole asks the peers of a launch for their part of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from peftc.data.tokens import IGNORED
from peftc.nn.peers import ALONE, Peers
from peftc.nn.vocabulary import Logits, nll
from peftc.tasks.sentences import sentence_vectors
from peftc.tasks.task import Batch


def classes(logits: Tensor, batch: Batch, _peers: Peers = ALONE) -> Tensor:
    """Return the cross-entropy with classes (batch,), or with shares of classes (batch, classes) after mixing."""
    return F.cross_entropy(logits.float(), batch.targets.to(logits.device))


def tokens(logits: Logits, batch: Batch, _peers: Peers = ALONE) -> Tensor:
    """Return the negative log-likelihood of the tokens that count, averaged within each sample first."""
    targets = batch.targets.to(logits.device)
    kept = targets != IGNORED
    if isinstance(logits, Tensor):
        each = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    else:
        each = torch.zeros(targets.shape, device=logits.device)
        each = each.masked_scatter(kept, nll(logits[kept], targets[kept]))
    return (each.sum(1) / kept.sum(1).clamp_min(1)).mean()


def pairs(hidden: Tensor, batch: Batch, peers: Peers = ALONE) -> Tensor:
    """Return 1 - the correlation of the cosines of sentence pairs with their scores, within the batch."""
    assert isinstance(batch.inputs, dict)
    vectors = sentence_vectors(hidden.float(), batch.inputs["attention_mask"].to(hidden.device))
    one, other = vectors.view(len(batch.targets), 2, -1).unbind(1)
    cosines, scores = peers.all((one * other).sum(1)), peers.all(batch.targets.to(hidden.device, torch.float32))
    return 1 - F.cosine_similarity(cosines - cosines.mean(), scores - scores.mean(), dim=0)
