"""The exercises' answers, checked: "not yet" while unanswered, a hint when wrong, what to notice when right.

To add one: a function that takes the answer, asserts with a hint, and returns what to notice; then a line in `CHECKS`.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch

from helpers.minicoco.sprites import CATEGORIES


def check(name: str, answer, strict: bool = False) -> None:
    """Prints whether `answer` solves the exercise `name`. With `strict`, anything but a right answer raises.

    Raises ValueError for an exercise that does not exist, AssertionError (only if strict) for a wrong answer.
    """
    if name not in CHECKS:
        raise ValueError(f"There is no exercise {name!r}. There are: {', '.join(sorted(CHECKS))}.")
    try:
        assert answer is not ..., (
            "not yet. Replace the ... with your answer and run this cell again."
        )
        notice = CHECKS[name](answer)
    except Exception as error:  # whatever a reader's function may raise
        hint = str(error) if isinstance(error, AssertionError) else f"your answer raised {error!r}."
        if strict:
            raise AssertionError(f"{name}: {hint}") from error
        print(f"{'·' if answer is ... else '✗'} {name}: {hint}")
    else:
        print(f"✓ {name}: {notice}")


def five_of_a_thousand(share) -> str:
    """The share of captions that find their picture among the first five of 1,000, by guessing."""
    assert not math.isclose(share, 0.5), "0.5 per cent is right; as a share it is smaller."
    assert not math.isclose(share, 1 / 1000), (
        "that is the first place alone; there are five that count."
    )
    assert math.isclose(share, 5 / 1000), (
        "each of the 1,000 places is as likely as any other. Five of them count."
    )
    return "0.005: that number stands beside every recall@5 over 1,000 pictures in this course."


def diagonal(share) -> str:
    """`share(similarity [captions, pictures])` → the share of captions whose best picture is their own."""
    similarity = torch.tensor(
        [[0.9, 0.1, 0.2, 0.3], [0.8, 0.4, 0.1, 0.0], [0.7, 0.0, 0.3, 0.2], [0.1, 0.0, 0.1, 0.6]]
    )
    result = float(share(similarity))
    assert not math.isclose(result, 2), "that is how many; divide by the number of captions."
    assert not math.isclose(result, 1), (
        "are you looking at columns? Each caption is a row: the best is over dim=1."
    )
    assert math.isclose(result, 0.5), (
        f"rows 0 and 3 of the test's table are right, two of four; you get {result:.3f}."
    )
    return "the same table by columns asks the other question, which caption a picture picks, and may answer otherwise."


def caption_count(count) -> str:
    """`count(coco)`: the parsed captions JSON → {image id: number of captions}."""
    coco = {
        "images": [{"id": 139}, {"id": 285}, {"id": 632}],
        "annotations": [
            {"id": i, "image_id": image, "caption": "a cat"}
            for i, image in enumerate([285, 139, 285])
        ],
    }
    counts = dict(count(coco))
    assert set(counts) >= {139, 285}, (
        f"every image id belongs in the result; it has {sorted(counts)}."
    )
    assert (counts[139], counts[285]) == (1, 2), (
        f"image 139 has 1 caption and image 285 has 2; you counted {counts[139]} and {counts[285]}. Look at image_id."
    )
    assert counts.get(632) == 0, (
        "image 632 has no caption and must be there with a 0. Start from coco['images']."
    )
    return (
        "start from the images, and one without captions shows up before training does it for you."
    )


def box_iou(iou) -> str:
    """`iou(a, b)` of two boxes (left, top, width, height)."""
    side = float(iou((2, 2, 4, 4), (4, 2, 4, 4)))
    assert side != 0, (
        "these two overlap: the last two numbers are width and height, not the opposite corner."
    )
    assert not math.isclose(side, 8 / 16), (
        "you divide by one box. The union is both areas less what they share."
    )
    assert not math.isclose(side, 8 / 32), (
        "what both cover is counted twice in your union: take it off once."
    )
    assert math.isclose(side, 8 / 24), (
        f"(2, 2, 4, 4) and (4, 2, 4, 4) share 8 of 24 pixels; you get {side:.3f}."
    )
    assert iou((0, 0, 4, 4), (6, 1, 4, 4)) == 0, (
        "boxes apart share nothing: cut a negative width off at 0."
    )
    assert iou((0, 0, 4, 4), (9, 9, 4, 4)) == 0, (
        "two negative sides multiply to a positive area: cut off each at 0."
    )
    assert math.isclose(iou((1, 1, 2, 6), (0, 2, 6, 2)), 4 / 20), (
        "a tall box and a wide one: mind which side is which."
    )
    return "shifted by half its width, a box overlaps itself by only a third: an IoU of 0.5 is a rather good match."


def padding_mask(pad) -> str:
    """`pad(sequences)` → input_ids and attention_mask, int [B, T], padded with 0 on the right."""
    sequences = [[101, 7592, 102], [101, 1037, 2417, 2482, 102], [101, 102]]
    ids, mask = (torch.as_tensor(part).long() for part in pad(sequences))
    shapes = f"{list(ids.shape)} and {list(mask.shape)}"
    assert tuple(ids.shape) == tuple(mask.shape) == (3, 5), (
        f"both are [3, 5], as the longest needs; yours: {shapes}."
    )
    expected = torch.tensor([s + [0] * (5 - len(s)) for s in sequences])
    assert torch.equal(ids, expected), (
        "the tokens come first, then zeros fill the row up to the longest."
    )
    assert not torch.equal(mask, 1 - expected.sign()), (
        "1 stands for a real token, 0 for padding: yours is upside down."
    )
    assert torch.equal(mask, expected.sign()), (
        "the mask is 1 on the first len(sequence) places of each row."
    )
    zero = torch.as_tensor(pad([[5, 0, 6], [5]])[1]).tolist()
    assert zero == [[1, 1, 1], [1, 0, 0]], (
        "a real token may have the number 0: build the mask from the lengths."
    )
    return "from the lengths, not from the ids: a real token may have the number that pads."


def masked_mean(pool) -> str:
    """`pool(hidden [B, T, D], mask [B, T])` → the mean over real tokens, [B, D]."""
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    pooled = pool(hidden, mask)
    assert tuple(pooled.shape) == (3, 4), (
        f"the result has shape {tuple(pooled.shape)}; one vector a text is [3, 4]."
    )
    expected = torch.stack([hidden[row, : mask[row].sum()].mean(0) for row in range(3)])
    assert not torch.allclose(pooled, hidden.mean(1), atol=1e-5), (
        "padding is averaged in: the mask is not used."
    )
    assert not torch.allclose(pooled, (hidden * mask[..., None]).mean(1), atol=1e-5), (
        "padding adds nothing to your sum, good, but you still divide by its length. Divide by mask.sum(1)."
    )
    assert torch.allclose(pooled, expected, atol=1e-5), (
        "each text's mean is over its own real tokens only."
    )
    return "the same caption gets the same vector, however long its neighbours in the batch are."


def token_count(tokens) -> str:
    """`tokens(size, patch)` → how many tokens a ViT reads of a picture of `size` × `size` pixels."""
    for size, patch in ((96, 8), (224, 16), (336, 14)):
        right, found = (size // patch) ** 2 + 1, tokens(size, patch)
        assert found not in (size // patch, size // patch + 1), (
            "that is one row of patches. How many rows are there?"
        )
        assert found != right - 1, (
            f"{found} patches, and which token comes before the first of them?"
        )
        assert found == right, (
            f"{size} pixels in patches of {patch} make {right} tokens; you get {found}."
        )
    return (
        "half the patch side means four times the patches, and sixteen times the work in attention."
    )


def normalise(cosines) -> str:
    """`cosines(a [N, D], b [M, D])` → the cosine of each row of `a` with each row of `b`, [N, M]."""
    a, b = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    b = b[:3]
    result = torch.as_tensor(cosines(a, b))
    assert tuple(result.shape) == (4, 3), (
        f"the result has shape {tuple(result.shape)}; each a with each b is [4, 3]."
    )
    assert not torch.allclose(result, a @ b.T, atol=1e-5), (
        "those are dot products: a longer vector scores higher."
    )
    assert torch.allclose(torch.as_tensor(cosines(10 * a, b)), result, atol=1e-5), (
        "a's lengths still count."
    )
    assert torch.allclose(torch.as_tensor(cosines(a, 10 * b)), result, atol=1e-5), (
        "b's lengths still count."
    )
    right = torch.nn.functional.cosine_similarity(a[:, None], b, dim=-1)
    assert torch.allclose(result, right, atol=1e-5), (
        "divide each row by its own length: F.normalize(…, dim=-1)."
    )
    return "only directions are compared, so no picture wins by being long; CLIP normalises both sides for this reason."


def one_pair(loss) -> str:
    """The InfoNCE loss of a batch of one pair."""
    assert loss == 0, (
        "with one caption to choose from, what probability does softmax give it? And minus its logarithm?"
    )
    return "there is nothing to tell apart: a contrastive loss learns from the other pairs of its batch."


def untrained(loss) -> str:
    """Roughly the InfoNCE loss of an untrained model at batch size 512."""
    assert not math.isclose(loss, math.log2(512), abs_tol=0.1), (
        "that is in bits; cross-entropy is in nats: ln."
    )
    assert abs(loss - math.log(512)) < 0.1, (
        "a guess among n captions has probability 1/n. What is −ln(1/512)?"
    )
    return "ln 512 ≈ 6.24. A loss that stays near ln(batch) means that nothing is being learned."


def temperature(softmax) -> str:
    """`softmax(similarities [N, M], temperature)` → the probabilities of each row, [N, M]."""
    similarities = torch.tensor([[0.9, 0.1, -0.3], [0.2, 0.4, 0.1]])
    result = torch.as_tensor(softmax(similarities, 0.07))
    assert result.shape == similarities.shape, (
        f"the result has shape {tuple(result.shape)}, not [2, 3]."
    )
    assert not torch.allclose(result, torch.softmax(similarities, 1), atol=1e-4), (
        "the temperature has no effect yet."
    )
    assert not torch.allclose(result, torch.softmax(similarities * 0.07, 1), atol=1e-4), (
        "you multiply by the temperature. Divide: a low temperature makes differences larger."
    )
    assert torch.allclose(result.sum(1), torch.ones(2), atol=1e-5), (
        "each row must sum to 1: softmax over dim=1."
    )
    assert torch.allclose(result, torch.softmax(similarities / 0.07, 1), atol=1e-4), (
        "softmax(s / temperature)."
    )
    return "cosines live in [−1, 1]; without 1/0.07 even a perfect match would get a timid probability."


def arange(accuracy) -> str:
    """`accuracy(logits [N, C], labels [N])` → the share of images whose best class is their label."""
    labels = np.array([2, 0, 0, 1, 2, 2])
    predicted = np.array([2, 0, 1, 1, 2, 0])
    logits = torch.from_numpy(np.eye(3, dtype=np.float32)[predicted])
    result = float(accuracy(logits, torch.from_numpy(labels)))
    assert not math.isclose(result, float((predicted == np.arange(6)).mean())), (
        "you compare with arange. That is right for a batch of pairs (caption i fits image i), not for classes."
    )
    assert not 1 < result <= 100, "as a share, please: between 0 and 1."
    assert math.isclose(result, 4 / 6, abs_tol=1e-6), (
        f"4 of these 6 are right; you get {result:.3f}."
    )
    return "in training the diagonal is the target; in classification many images share one class."


def recall(found) -> str:
    """`found(similarity [N, M], owner [M], k)` → image→text recall@k, any of an image's captions counting."""
    similarity = torch.tensor(
        [[0.1, 0.9, 0.55, 0.4, 0.3], [0.8, 0.2, 0.5, 0.6, 0.1], [0.7, 0.6, 0.45, 0.35, 0.2]]
    )
    owner = torch.tensor([0, 0, 1, 1, 2])
    results = [float(found(similarity, owner, k)) for k in (1, 2, 5)]
    assert not 1 < max(results) <= 100, "as a share, please: between 0 and 1."
    assert not math.isclose(results[1], 0, abs_tol=1e-6), (
        "only the first caption of each image seems to count. Any caption whose owner is the image is right."
    )
    assert not math.isclose(results[1], 1 / 3, abs_tol=1e-6), (
        "you give an image the share of its captions that are found. One is enough: found or not found."
    )
    assert not math.isclose(results[0], 2 / 5, abs_tol=1e-6), (
        "that is text→image: the captions ask. Here each image (a row) ranks all captions."
    )
    expected = [1 / 3, 2 / 3, 1]
    assert np.allclose(results, expected, atol=1e-6), (
        f"for three images, recall@1, 2 and 5 are {expected[0]:.3f}, {expected[1]:.3f} and 1; you get {results}."
    )
    return "with five captions an image has five chances; keeping one of them is another task, with lower numbers."


def clipping(clip) -> str:
    """`clip(gradients, most)` → the tensors, scaled together so that their common length is at most `most`."""
    gradients = [
        torch.tensor([3.0, 0.0]),
        torch.tensor([[2.0], [math.sqrt(12)]]),
    ]  # of lengths 3 and 4, 5 together
    result = list(clip([g.clone() for g in gradients], 1.0))
    assert [tuple(g.shape) for g in result] == [(2,), (2, 1)], (
        "each tensor keeps its shape; return them as a list."
    )
    alone = [g / g.norm() for g in gradients]
    assert not all(torch.allclose(r, a, atol=1e-4) for r, a in zip(result, alone, strict=True)), (
        "you clip each tensor alone: that turns the whole gradient. One factor for all of them."
    )
    assert not all(
        torch.equal(r, g.clamp(-1, 1)) for r, g in zip(result, gradients, strict=True)
    ), "you clip each number: that changes the direction. Make the whole vector shorter."
    length = math.sqrt(sum(float(g.square().sum()) for g in result))
    assert not math.isclose(length, 5 / 7, abs_tol=1e-3), (
        "lengths do not add up: 3 and 4 together are 5. Add squares."
    )
    assert all(
        torch.allclose(r, g / 5, atol=1e-4) for r, g in zip(result, gradients, strict=True)
    ), f"3 and 4 together have length 5, which should become 1; yours is {length:.3f} long."
    short = list(clip([g / 10 for g in gradients], 1.0))
    assert all(
        torch.allclose(r, g / 10, atol=1e-4) for r, g in zip(short, gradients, strict=True)
    ), "a gradient of length 0.5 is short enough: leave it, the factor is never above 1."
    return "one factor for all parameters: the step gets shorter and keeps its direction."


def paired_difference(difference) -> str:
    """`difference(after, before)`, one number a seed → (mean difference, its standard error)."""
    after, before = [0.62, 0.70, 0.66], [0.60, 0.66, 0.63]  # differences 0.02, 0.04, 0.03
    mean, error = (float(value) for value in difference(after, before))
    assert not math.isclose(mean, -0.03, abs_tol=1e-6), (
        "the sign: after less before, so that a gain is positive."
    )
    assert math.isclose(mean, 0.03, abs_tol=1e-6), (
        f"the differences are 0.02, 0.04, 0.03; your mean is {mean:.4f}."
    )
    unpaired = math.sqrt((np.var(after, ddof=1) + np.var(before, ddof=1)) / 3)
    assert not math.isclose(error, unpaired, rel_tol=0.02), (
        "that is the error of two unrelated groups. Subtract seed by seed first: what both share cancels."
    )
    assert not math.isclose(error, 0.01, rel_tol=0.02), (
        "single seeds scatter like that; their mean scatters less: √n."
    )
    assert not math.isclose(error, math.sqrt(0.0002) / 3, rel_tol=0.02), (
        "the spread of a sample: ddof=1, over n − 1."
    )
    assert math.isclose(error, 0.01 / math.sqrt(3), rel_tol=0.01), (
        f"s/√n is 0.00577 here; you get {error:.5f}."
    )
    return "unpaired, the error would have been five times as large, and the same gain nothing to speak of."


def training_bytes(needed) -> str:
    """`needed(trained, frozen)` → bytes of weights, gradients and AdamW's moments in 32-bit floats."""
    a, b = float(needed(1000, 0)), float(needed(0, 1000))
    assert a not in (4, 16) or b not in (4, 16), "for that many numbers, not for one."
    assert b != 16_000, "a frozen number has no gradient, and AdamW keeps nothing for it."
    assert b == 4_000, (
        f"a frozen number is there once, in 4 bytes; you get {b:,.0f} bytes for 1,000 of them."
    )
    assert a != 12_000, "one is missing: the weight, its gradient, and *two* means in AdamW."
    assert a != 8_000, "AdamW's two running means are missing, of the gradient and of its square."
    assert a == 16_000, (
        f"four numbers of 4 bytes for each trained one; you get {a:,.0f} bytes for 1,000 of them."
    )
    assert needed(1000, 1000) == 20_000, "both kinds add up."
    return "16 bytes against 4: 200 million trained numbers fill 3.2 GB before the first picture has come in."


def one_sigmoid_pair(loss) -> str:
    """The sigmoid loss of one pair at cosine 0, t = 10, b = −10: −ln σ(−10)."""
    assert not math.isclose(loss, 0), (
        "0 is InfoNCE's answer, which has nothing to compare. Here one question is left."
    )
    assert not math.isclose(loss, math.log(2), abs_tol=0.01), (
        "ln 2 is the price at logit 0. What is the logit here?"
    )
    assert loss > 0, "a loss is minus a logarithm of a probability. It cannot be negative."
    assert not math.isclose(loss, math.log1p(math.exp(-10)), rel_tol=0.1), (
        "that is the price of a no. Right is yes."
    )
    assert math.isclose(loss, math.log1p(math.exp(10)), abs_tol=0.01), (
        "the logit is 10·0 − 10. What is −ln σ(−10)?"
    )
    return "about 10, the bias turned round. Alone, a pair still teaches, but only one thing: to say yes to everything."


def calm_bias(bias) -> str:
    """`calm(n)` → the bias at which step 0 costs least, all cosines being 0."""
    for n in (2, 16, 1024, 32768):
        right, found = -math.log(n - 1), float(bias(n))
        assert n == 2 or not math.isclose(found, -right), (
            "the sign: most pairs are no pairs, so the bias is negative."
        )
        assert not math.isclose(found, -math.log(n)), (
            "nearly. σ(b) = 1/n: how large is the odds 1/n : (1 − 1/n)?"
        )
        assert not math.isclose(found, -10), (
            "−10 is right for one batch size only. Let it depend on n."
        )
        assert math.isclose(found, right, abs_tol=1e-6), (
            f"for n = {n} you get {found:.3f}. Set the slope −1/(1 + eᵇ) + (n − 1)·eᵇ/(1 + eᵇ) to zero."
        )
    return "at that bias every answer starts as 1/n, the share of true pairs, and push and pull are in balance."


def bias_shift(add) -> str:
    """`add(n, m)` → what to add to logits that were trained in batches of n and are used in batches of m."""
    assert math.isclose(add(64, 64), 0, abs_tol=1e-9), "with m = n nothing changes: the shift is 0."
    right, found = math.log(255 / 15), float(add(256, 16))
    assert not math.isclose(found, -right), (
        "the sign: in a smaller batch a pair is less rare, so logits must rise."
    )
    assert not math.isclose(found, math.log(256 / 16)), (
        "nearly: it is the odds that count, 1 to n − 1."
    )
    assert math.isclose(found, right), (
        f"shift(256, 16) is calm(16) − calm(256) = {right:.3f}; you get {found:.3f}."
    )
    return "what was learned about pairs stays; only how rare they are has changed."


def template(text) -> str:
    """A prompt template: a sentence with one {} where the class name goes."""
    assert isinstance(text, str), f"a template is a string; yours is a {type(text).__name__}."
    assert text.count("{}") == 1, (
        f"the name goes where {{}} stands, once; yours has it {text.count('{}')} times."
    )
    assert text.strip(" .") != "{}", (
        "that is the bare name. Put words around it: what kind of picture is this?"
    )
    assert not re.search(r"\b[Aa]n \{\}", text), (
        'write "a {}": prompt() turns it into "an" where the name wants it.'
    )
    named = [name for name in CATEGORIES if re.search(rf"\b{name}s?\b", text.lower())]
    assert not named, (
        f"it names another class ({named[0]}), and will pull every picture towards it."
    )
    return "what the words add alike to all classes changes no winner; an ensemble averages out what they add unevenly."


def two_layers(flow) -> str:
    """`flow(upper, lower, source)` → the maximum flow through two layers [N, N] to every input, [N]."""
    upper = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    lower = torch.tensor([[0.6, 0.2, 0.2], [0.2, 0.7, 0.1], [0.1, 0.4, 0.5]])
    for source in (0, 1):
        found = torch.as_tensor(flow(upper, lower, source)).float()
        right = torch.minimum(upper[source][:, None], lower).sum(dim=0)
        assert tuple(found.shape) == (3,), (
            f"one flow for each input is [3]; yours has shape {tuple(found.shape)}."
        )
        assert not torch.allclose(found, upper[source] @ lower), (
            "that is rollout. A route carries its narrower pipe."
        )
        transposed = torch.minimum(upper[source][:, None], lower.T).sum(dim=0)
        assert not torch.allclose(found, transposed), (
            "turned: lower[i, j] leads from the middle token i to input j."
        )
        widest = torch.minimum(upper[source][:, None], lower).amax(dim=0)
        assert not torch.allclose(found, widest), (
            "that is the best single route. All of them can be used at once."
        )
        shown = [round(value, 2) for value in right.tolist()]
        assert torch.allclose(found, right, atol=1e-5), (
            f"from token {source} of the worked example the flows are {shown}; you get {found.tolist()}."
        )
    return "a sum of minima where rollout has a sum of products: a capacity, not a share."


def ignored(flow) -> str:
    """The most that can flow to a patch whose column in the first layer's attention is all zeros."""
    assert flow != 0, (
        "its own residual pipe is still there: half of every row of Â goes straight down."
    )
    assert not math.isclose(flow, 0.5**12), (
        "that is rollout along the residual. A pipe's width is no factor here."
    )
    assert flow <= 1, "no more can arrive than leaves the source, which is 1."
    assert flow != 1, "what pipes lead into the patch? Add up their widths: the cut at the input."
    assert math.isclose(flow, 0.5), (
        "all that leads into it is ½ from its own residual, and ½ · 0 from attention."
    )
    return "½: no number of layers lets more through, and many layers let just that through, whatever they attend to."


def caption_matters(methods) -> str:
    """Of raw, rollout, flow and relevance, those whose picture map changes with the caption."""
    chosen = {methods} if isinstance(methods, str) else set(methods)
    odd = sorted(chosen - {"raw", "rollout", "flow", "relevance"})
    assert not odd, f"{odd[0]!r} is none of the four: raw, rollout, flow, relevance."
    assert not chosen & {"raw", "rollout", "flow"}, (
        "raw, rollout and flow are computed from the image tower's attention. Does the caption ever get in there?"
    )
    assert chosen, "one of them uses a number that both towers have made together."
    return "the towers meet only in the cosine, so only what starts from the cosine can know of the caption."


def local_loss(losses) -> str:
    """InfoNCE of untrained heads in 8 processes of 64 pairs: (own negatives only, gathered)."""
    own, gathered = (float(value) for value in losses)
    assert not math.isclose(own, gathered), (
        "the two differ: how many captions is a picture compared with in each case?"
    )
    assert gathered > own, (
        "the other way round: more captions to choose from are a harder question."
    )
    assert math.isclose(own, math.log(64), abs_tol=0.05), (
        "alone, a process has 64 captions. A blind guess costs ln n."
    )
    assert not math.isclose(gathered, 8 * own, rel_tol=0.02), (
        "losses are averaged, not added. It is n that grows."
    )
    assert math.isclose(gathered, math.log(512), abs_tol=0.05), (
        "gathered, each picture chooses among 8 × 64 captions."
    )
    return "ln 64 = 4.16 against ln 512 = 6.24: a first loss that is too low tells you that nothing is gathered."


def ring_round(texts_at) -> str:
    """`texts_at(rank, k, world)` → whose texts process `rank` holds in round k, each handing on to rank + 1."""
    for rank, world in ((1, 4), (0, 4), (2, 3), (0, 1)):
        held, right = (
            [texts_at(rank, k, world) for k in range(world)],
            [(rank - k) % world for k in range(world)],
        )
        assert held[0] == rank, f"in round 0 each has its own: process {rank} says {held[0]}."
        assert set(held) <= set(range(world)), (
            f"there are processes 0 to {world - 1}; you get {held}. Use % world."
        )
        assert held == right or held != [(rank + k) % world for k in range(world)], (
            "that is the other way round: they are handed to rank + 1, so what arrives comes from rank − 1."
        )
        assert held == right, (
            f"process {rank} of {world} holds {right} in rounds 0, 1, …; you get {held}."
        )
    return "after `world` rounds each has met all texts once, and the next move brings everything home."


CHECKS = {
    "00-chance": five_of_a_thousand,
    "00-diagonal": diagonal,
    "01-caption-count": caption_count,
    "01-iou": box_iou,
    "01-padding-mask": padding_mask,
    "02-token-count": token_count,
    "02-masked-mean": masked_mean,
    "02-normalise": normalise,
    "03-one-pair": one_pair,
    "03-untrained": untrained,
    "03-temperature": temperature,
    "04-clip": clipping,
    "04-paired": paired_difference,
    "04-bytes": training_bytes,
    "05-one-pair": one_sigmoid_pair,
    "05-calm": calm_bias,
    "05-shift": bias_shift,
    "06-recall": recall,
    "06-arange": arange,
    "06-prompt": template,
    "07-two-layers": two_layers,
    "07-ignored": ignored,
    "07-caption": caption_matters,
    "08-local": local_loss,
    "08-ring": ring_round,
}
