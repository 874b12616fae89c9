"""Put well-known mistakes into a copy of the code, one at a time, and see that a test fails: `make mutants`.

A test that cannot fail proves nothing. Each row below is a mistake that published LoRA or CLIP code has made, with the
line that it changes and the tests that have to notice.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    mistake: str
    file: str
    right: str  # as it stands in the file
    wrong: str
    tests: str


LAYER, INJECT, FILE = "lora/layer.py", "lora/inject.py", "lora/adapter_file.py"
LOSSES, RETRIEVAL = "clip_medical/training/losses.py", "clip_medical/evaluation/retrieval.py"
LEARNER, CONTRASTIVE = "clip_medical/training/learner.py", "clip_medical/training/contrastive.py"
MODEL, BATCHES = "clip_medical/model.py", "clip_medical/data/batches.py"
PNG = "clip_medical/data/png.py"
FRAGMENTS, ZERO_SHOT = "clip_medical/data/fragments.py", "clip_medical/evaluation/zero_shot.py"
RUNS, EXPORT, ONNX = "clip_medical/runs.py", "clip_medical/export.py", "clip_medical/onnx_export.py"
CLASSES, SEARCH = "clip_medical/evaluation/classification.py", "clip_medical/evaluation/search.py"
FUSED, PRODUCTS = "clip_medical/fused.py", "clip_medical/products.py"
COMMON, STRESS = "experiments/common.py", "experiments/stress_test.py"
VARIANTS, ABLATION = "experiments/variants.py", "experiments/ablation.py"

MUTANTS = [
    Mutant("B starts random", LAYER, "torch.zeros(base.out_features, rank,", "torch.randn(base.out_features, rank,", "tests/lora"),
    Mutant("A initialised without sqrt 5", LAYER, "a=math.sqrt(5)", "a=0", "tests/lora"),
    Mutant("alpha not divided by r", LAYER, "self.alpha / (math.sqrt(rank) if rslora else rank)", "self.alpha", "tests/lora"),
    Mutant("dropout on the base path", LAYER, "y = self.base(x)", "y = self.base(F.dropout(x, self.dropout, self.training))", "tests/lora"),
    Mutant("adapter in the base's half precision", LAYER, "torch.empty(rank, base.in_features, device=device, dtype=torch.float32)", "torch.empty(rank, base.in_features, device=device, dtype=base.weight.dtype)", "tests/lora"),
    Mutant("merge writes into the base", LAYER, "    new.weight.copy_(total)\n", "    new.weight.copy_(total)\n    weight.copy_(total)\n", "tests/lora"),
    Mutant("dropout live in an eval model", LAYER, "        self.train(base.training)  #", "        #", "tests/lora"),
    Mutant("targets match as substrings", INJECT, "if target in wanted and (inside", "if any(w in target for w in wanted) and (inside", "tests/lora"),
    Mutant("base not frozen", INJECT, "    model.requires_grad_(False)  #", "    pass  #", "tests/lora"),
    Mutant("lenient loading", FILE, "    _check_tensors(tensors, shapes)\n    names =", "    names =", "tests/lora"),
    Mutant("exp of logit_scale forgotten", LOSSES, ".exp() * queries", " * queries", "tests/training/test_losses.py"),
    Mutant("loss one way only", LOSSES, "surprise(text_features, image_features, logit_scale, positives.T)", "surprise(image_features, text_features, logit_scale, positives)", "tests/training/test_losses.py"),
    Mutant("duplicates are negatives", LOSSES, ".any(dim=0)", ".all(dim=0)", "tests/training/test_losses.py"),
    Mutant("ties count for the model", RETRIEVAL, "similarity.numpy() >= best[:, None].numpy(), axis=1)", "similarity.numpy() > best[:, None].numpy(), axis=1) + 1", "tests/evaluation"),
    Mutant("NaN accepted", RETRIEVAL, "if features.numel() and not torch.stack(features.aminmax()).isfinite().all():", "if False:", "tests/evaluation"),
    Mutant("random state not replayed", CONTRASTIVE, "        restore(state)\n", "", "tests/training/test_contrastive.py"),
    Mutant("query of the first token in a caption", "clip_medical/towers.py", "normed.index_select(0, sequences.kept)", "normed[: len(sequences.kept)]", "tests/test_towers.py"),
    Mutant("end token sees its padding", "clip_medical/towers.py", "_send(has[:, None, None, :longest], device)", "_send(torch.ones_like(has)[:, None, None, :longest], device)", "tests/test_towers.py"),
    Mutant("text that sees ahead below the last layer", "clip_medical/towers.py", "causal=group.seen is not None", "causal=False", "tests/test_towers.py"),
    Mutant("slow attention in half precision", FUSED, " or key.dtype.itemsize == 2", "", "tests/test_fused.py"),
    Mutant("plain attention that is not causal", FUSED, "        if causal:\n", "        if False:\n", "tests/test_fused.py"),
    Mutant("slope left out of the bias before the activation", FUSED, "rows, w1, SLOPE * b1)", "rows, w1, b1)", "tests/test_fused.py"),
    Mutant("slope taken from the bias after the activation", FUSED, "F.silu(z), w2, b2)", "F.silu(z), w2, b2 / SLOPE)", "tests/test_fused.py"),
    Mutant("slope of the activation left out beside an adapter", FUSED, "F.silu(SLOPE * inner) / SLOPE if", "F.silu(SLOPE * inner) if", "tests/test_fused.py"),
    Mutant("another activation taken for CLIP's own", FUSED, 'quick = mlp.config.hidden_act == "quick_gelu"', 'quick = True', "tests/test_fused.py"),
    Mutant("gradient of a token sent to another", FUSED, "index_add_(0, places, grad", "index_add_(0, places.flip(0), grad", "tests/test_fused.py"),
    Mutant("gradients of pictures copied", "clip_medical/towers.py", "rows.split(places) if len(places) > 1 else [rows]", "rows.split(places)", "tests/test_towers.py"),
    Mutant("captions that meet again taken for one", "clip_medical/towers.py", "(ids[1:] == ids[:-1]).cumprod(dim=1) == 0", "ids[1:] != ids[:-1]", "tests/test_towers.py"),
    Mutant("beginnings computed for each caption", "clip_medical/towers.py", "    first[1:] &= (ids[1:] == ids[:-1]).cumprod(dim=1) == 0\n", "", "tests/test_towers.py"),
    Mutant("beginning read from the first caption of all", "clip_medical/towers.py", "0).cummax(dim=0).values", "0)", "tests/test_towers.py"),
    Mutant("rows left in the order of the groups", "clip_medical/towers.py", "[torch.cat(read)[places].argsort()]", "", "tests/test_towers.py"),
    Mutant("positions counted through all captions", "clip_medical/towers.py", "columns.expand_as(first)[first]", "(first.flatten().cumsum(0).view_as(first) % len(columns))[first]", "tests/test_towers.py"),
    Mutant("captions padded to the longest of all", "clip_medical/towers.py", "    counts = _like_length(lengths, device)", "    counts = [len(lengths)]", "tests/test_towers.py"),
    Mutant("captions left in the order of their lengths", "clip_medical/towers.py", "order.argsort()[place]", "place", "tests/test_towers.py"),
    Mutant("patches cut along the other side", "clip_medical/towers.py", "cut.permute(0, 2, 4, 1, 3, 5)", "cut.permute(0, 4, 2, 1, 3, 5)", "tests/test_towers.py"),
    Mutant("frozen MLP under autocast", FUSED, "_is_frozen(mlp.fc2) and not torch.is_autocast_enabled(rows.device.type)", "_is_frozen(mlp.fc2)", "tests/test_fused.py"),
    Mutant("joined adapters without their scaling", FUSED, "layer.strength * layer.scaling * layer.lora_A", "layer.lora_A", "tests/test_fused.py"),
    Mutant("joined adapters always at full strength", FUSED, "layer.strength * layer.scaling * layer.lora_A", "layer.scaling * layer.lora_A", "tests/test_fused.py"),
    Mutant("branch of one layer added to another", FUSED, "part, next(each_B))", "inner[:, : part.shape[1]], next(each_B))", "tests/test_fused.py"),
    Mutant("gradient that passes the branches by", FUSED, "grad_rows = product(grad_inner, A.T)", "grad_rows = torch.zeros_like(rows)", "tests/test_fused.py"),
    Mutant("dropout of joined adapters passed over", FUSED, "return not (layer.training and layer.dropout)", "return True", "tests/test_fused.py"),
    Mutant("adapter at strength 0 read all the same", FUSED, "layer.base if type(layer) is LoRALinear and layer.strength == 0 else layer", "layer", "tests/test_fused.py"),
    Mutant("learned weights taken for frozen ones", FUSED, "return not (layer.weight.requires_grad or layer.bias.requires_grad)", "return True", "tests/test_fused.py"),
    Mutant("scale left out of the gradient of the keys", FUSED, "_scaled_bmm(ctx.scale, grad_scores.mT, q)", "grad_scores.mT @ q", "tests/test_fused.py"),
    Mutant("plain attention in evaluation", FUSED, "if attention.training and key", "if key", "tests/test_fused.py"),
    Mutant("another kernel where no graph is kept", FUSED, "if attention.training and key", "if torch.is_grad_enabled() and key", "tests/test_fused.py"),
    Mutant("few queries taken for a short sequence", FUSED, "short = key.shape[2]", "short = query.shape[2]", "tests/test_fused.py"),
    Mutant("probabilities in another format than the products", FUSED, "scores.softmax(dim=2)", "scores.softmax(dim=2, dtype=torch.float32)", "tests/test_fused.py"),
    Mutant("subclass taken for nn.Linear", FUSED, "if type(layer) is not nn.Linear or", "if not isinstance(layer, nn.Linear) or", "tests/test_fused.py"),
    Mutant("subclass taken for LoRALinear", FUSED, "if type(layer) is not LoRALinear or", "if not isinstance(layer, LoRALinear) or", "tests/test_fused.py"),
    Mutant("joined adapters in the format of the weights", FUSED, "*[b.lora_B.to(rows.dtype) for b in adapted]", "*[b.lora_B for b in adapted]", "tests/test_fused.py"),
    Mutant("factor of a product left out of its bias", PRODUCTS, "bias / scale).mul_", "bias).mul_", "tests/test_products.py"),
    Mutant("product in the place of a sum", PRODUCTS, "to.add_(", "to.copy_(", "tests/test_products.py"),
    Mutant("rows and columns of a product exchanged", PRODUCTS, "product(b.T, a.T).T", "product(b.T, a.T)", "tests/test_products.py"),
    Mutant("gradient of a learned weight lost", PRODUCTS, "flat.T @ rows.flatten(0, -2) if of_weight else None", "None", "tests/test_products.py"),
    Mutant("product in fp32 under autocast", PRODUCTS, ' or torch.is_autocast_enabled("cpu")', "", "tests/test_products.py"),
    Mutant("another library on every processor", PRODUCTS, '"AMD" in able.get("cpu_name", "") and ', "", "tests/test_products.py"),
    Mutant("a kernel made for every batch", PRODUCTS, "-count % MULTIPLE if made_for_each else 0", "0", "tests/test_products.py"),
    Mutant("rows spared for nothing in fp32", PRODUCTS, "by_onednn(device, dtype) or device.type", "device.type", "tests/test_products.py"),
    Mutant("spare rows read by a caption", "clip_medical/towers.py", ".argsort()], (0, spare))", ".argsort()], (spare, 0))", "tests/test_towers.py"),
    Mutant("the last rate tried taken for the best", VARIANTS, "beyond = {min(losses): best / 3, max(losses): 3 * best}", "beyond = {}", "tests/experiments/test_ablation.py"),
    Mutant("a rate that diverges taken for the best", VARIANTS, "math.inf if math.isnan(losses[lr]) else losses[lr], lr)", "losses[lr], lr)", "tests/experiments/test_ablation.py"),
    Mutant("a layer left to the slow library", FUSED, "return linear(rows, layer.weight, layer.bias)", "pass", "tests/test_products.py"),
    Mutant("products by oneDNN not counted", "experiments/flops.py", "2 * a[:-1].numel() * w[0] * w[1]", "0", "tests/experiments/test_flops.py"),
    Mutant("products in place not counted", "experiments/flops.py", "2 * a[0] * a[1] * b[1]", "0", "tests/experiments/test_flops.py"),
    Mutant("results without a place to go", "clip_medical/runs.py", "except OSError as error:\n        raise UserError(f\"{folder} cannot", "except EOFError as error:\n        raise UserError(f\"{folder} cannot", "tests/experiments/test_benchmark.py"),
    Mutant("activations kept after all", "clip_medical/towers.py", "if checkpointing and torch.is_grad_enabled():", "if False:", "tests/training/test_memory.py"),
    Mutant("announced pixels read again", "clip_medical/training/progress.py", "self.announced.pop(tuple(rows.tolist()), None)", "None", "tests/training/test_progress.py"),
    Mutant("format asked of logit_scale", MODEL, "return self.model.vision_model.embeddings.class_embedding.dtype", "return self.model.dtype", "tests/test_towers.py"),
    Mutant("adapter read back beside a base in fp32", "train.py", "load_run(folder, clip.device, clip.dtype)", "load_run(folder, clip.device)", "tests/test_train.py"),
    Mutant("temperature rounded with the weights", MODEL, "model.logit_scale.data = scale.to(device)", "model.logit_scale.data = model.logit_scale.data.float()", "tests/test_model.py"),
    Mutant("fp16 that skips steps for ever", "train.py", "learner.scaler.get_scale() <= 1", "not learner.scaler.is_enabled()", "tests/test_train.py"),
    Mutant("new plan without the fragments", "clip_medical/training/job.py", "pairs = self.pairs.in_epoch(self.config, 0)", "pairs = self.pairs", "tests/training/test_resume.py"),
    Mutant("grey pictures sent three times", BATCHES, "if pixels.stride(1) == 0:", "if False:", "tests/data/test_batches.py"),
    Mutant("freed memory given back", "clip_medical/training/memory.py", "c_library.mallopt(mmap_max, 0)", "pass", "tests/training/test_memory.py"),
    Mutant("bomb in a PNG inflated whole", PNG, "decompress(stream, size + 1)", "decompress(stream)", "tests/data/test_png.py"),
    Mutant("row of a PNG rounded down", PNG, "CHANNELS[colour] + 7) // 8", "CHANNELS[colour]) // 8", "tests/data/test_png.py"),
    Mutant("what follows the pixels of a PNG lost", PNG, 'struct.pack(">I", checksum), data[end:]]', 'struct.pack(">I", checksum), data[-12:]]', "tests/data/test_png.py"),
    Mutant("huge PNG held three times", PNG, "if size > LARGEST:", "if False:", "tests/data/test_png.py"),
    Mutant("refused zlib header replaced", PNG, "[stream[:2]]", '[b"\\x78\\x01"]', "tests/data/test_png.py"),
    Mutant("PNG without its checksum taken for whole", PNG, " or not decompressor.eof", "", "tests/data/test_png.py"),
    Mutant("all pictures begun at once", "clip_medical/data/cache.py", "if len(waiting) >= max(PART // RUN, 2 * _cores()):", "if False:", "tests/data/test_cache.py"),
    Mutant("a wait for another process without a word", "clip_medical/data/cache.py", "acquire(timeout=PATIENCE)", "acquire()", "tests/data/test_cache.py"),
    Mutant("run decoded to its end after an error", "clip_medical/data/cache.py", "        stopped.set()\n", "", "tests/data/test_cache.py"),
    Mutant("phantoms drawn ahead of another seed", "clip_medical/data/ahead.py", ", seed=config.seed)", ")", "tests/data/test_ahead.py"),
    Mutant("drawing ahead goes on without train.py", "clip_medical/data/ahead.py", "    sys.stdin.read()  #", "    return  #", "tests/data/test_ahead.py"),
    Mutant("drawing ahead looks for modules where it stands", "clip_medical/data/ahead.py", "sys.path[:] = {sys.path}", "sys.path.append({sys.path[1]!r})", "tests/data/test_ahead.py"),
    Mutant("drawing ahead told no flags", "train.py", "ahead.start(sys.argv[1:])", "ahead.start([])", "tests/data/test_ahead.py"),
    Mutant("phantoms drawn for every model", "clip_medical/data/ahead.py", 'if (config.data, config.model) == ("phantoms", "tiny-clip"):', 'if config.data == "phantoms":', "tests/data/test_ahead.py"),
    Mutant("a mistake told by the drawing too", "clip_medical/data/ahead.py", ", stderr=quiet)", ")", "tests/data/test_ahead.py"),
    Mutant("no train.py where no process is to be had", "clip_medical/data/ahead.py", "except OSError:", "except ChildProcessError:", "tests/data/test_ahead.py"),
    Mutant("bytes after the pixels of a PNG dropped", PNG, "or decompressor.unused_data:", "or False:", "tests/data/test_png.py"),
    Mutant("schedule counts skipped steps", LEARNER, "if self.scaler.get_scale() >= before:", "if True:", "tests/training/test_learner.py"),
    Mutant("gradient clipped before it is unscaled", LEARNER, "        self.scaler.unscale_(self.optimizer)\n", "", "tests/training/test_learner.py"),
    Mutant("features not normalised", MODEL, "return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)", "return self.model.visual_projection(pooled).float()", "tests/test_model.py"),
    Mutant("resume begins the data anew", BATCHES, "first = start % batches_per_epoch if", "first = 0 if", "tests/test_train.py"),
    Mutant("probabilities without the temperature", MODEL, ".float().exp().cpu()", ".float().cpu()", "tests/export"),
    Mutant("base of the adapter not checked", RUNS, "if expected != clip.fingerprint:", "if False:", "tests/export"),
    Mutant("trained temperature left behind", RUNS, "(CONFIG_FILE, WEIGHTS_FILE, SCALE, PROVENANCE)", "(CONFIG_FILE, WEIGHTS_FILE, PROVENANCE)", "tests/export"),
    Mutant("cast before the merge", EXPORT, "    merge(clip.model)\n    off", "    clip.model.to(dtype)\n    merge(clip.model.float())\n    off", "tests/export"),
    Mutant("export written in place", EXPORT, "        yield part\n        os.rename(part, folder)", "        folder.mkdir()\n        yield folder", "tests/export"),
    Mutant("upload without a yes", EXPORT, "    if not confirmed:", "    if False:", "tests/export"),
    Mutant("batch and length frozen by the tracing", ONNX, "dynamic_shapes=shapes, ", "", "tests/export"),
    Mutant("ONNX files not compared", ONNX, "    if not max(differences.values()) < TOLERANCE:", "    if False:", "tests/export"),
    Mutant("right answers counted twice", RETRIEVAL, "(query * len(candidates) + candidate).unique()", "query * len(candidates) + candidate", "tests/evaluation/test_retrieval.py"),
    Mutant("pools drawn with replacement", RETRIEVAL, "rng.permutation(len(images))[:size]", "rng.integers(len(images), size=size)", "tests/evaluation/test_retrieval.py"),
    Mutant("a picture in three pools taken for three", RETRIEVAL, "for of_draw in drawn]), group, chance, ks)", "for of_draw in drawn]), None, chance, ks)", "tests/evaluation/test_retrieval.py"),
    Mutant("precision breaks ties for the model", RETRIEVAL, "k - above.sum(dim=1) - (tied & ~same).sum(dim=1)", "torch.minimum(k - above.sum(dim=1), (tied & same).sum(dim=1))", "tests/evaluation/test_retrieval.py"),
    Mutant("argmax on ties", CLASSES, "of_truth > best_rival", "of_truth >= best_rival", "tests/evaluation/test_classification.py"),
    Mutant("AUROC: ties count for the model", CLASSES, "below.cumsum() - below / 2", "below.cumsum()", "tests/evaluation/test_classification.py"),
    Mutant("confusions turned round", CLASSES, "(right, predicted), 1)", "(predicted, right), 1)", "tests/evaluation/test_classification.py"),
    Mutant("calibration not weighted by n", CLASSES, "error += n / len(hits) *", "error += 1 / len(which.unique()) *", "tests/evaluation/test_classification.py"),
    Mutant("facets without the temperature", ZERO_SHOT, "(scale * cosines)", "(cosines)", "tests/evaluation/test_zero_shot.py"),
    Mutant("index of other weights searched", SEARCH, "if stored is not None and {", "if False and {", "tests/evaluation/test_search.py"),
    Mutant("half-written part counts", SEARCH, 'sorted(self.folder.glob("part-*.safetensors"))', 'sorted(p.with_suffix(".safetensors") for p in self.folder.glob("part-*.parquet"))', "tests/evaluation/test_search.py"),
    Mutant("duplicates indexed", SEARCH, 'elif row["hash"] in hashes:', "elif False:", "tests/evaluation/test_search.py"),
    Mutant("what is known read again", SEARCH, "if (item.source, item.name) in names:", "if False:", "tests/evaluation/test_search.py"),
    Mutant("thumbnail of a neighbour", SEARCH, 'side="right")', 'side="left")', "tests/evaluation/test_search.py"),
    Mutant("base with the trained temperature", COMMON, "        folder = Path(options.output or (", '        models["unadapted"].model.logit_scale.data.copy_(adapted.model.logit_scale)\n        folder = Path(options.output or (', "tests/experiments/test_common.py"),
    Mutant("held-out rows drawn anew", COMMON, 'if trained_on.get("fingerprint", fingerprint) != fingerprint:', "if False:", "tests/experiments/test_common.py"),
    Mutant("joint list: number within the facet", STRESS, "truth[f].clamp(min=0) + first[f]", "truth[f].clamp(min=0)", "tests/experiments/test_stress_test.py"),
    Mutant("joint list: ties for the model", ZERO_SHOT, "(scores >= scores.gather(1, column[:, None])).sum(dim=1) - 1", "(scores > scores.gather(1, column[:, None])).sum(dim=1)", "tests/evaluation/test_zero_shot.py"),
    Mutant("chance of one label for both", STRESS, "share * other if", "share if", "tests/experiments/test_stress_test.py"),
    Mutant("linear map with learning towers", VARIANTS, "clip.model.requires_grad_(False)\n    return", "clip.model.requires_grad_(True)\n    return", "tests/experiments/test_ablation.py"),
    Mutant("rate chosen in a quarter of the steps", VARIANTS, "lr, kept, bench.steps)", "lr, kept, bench.steps // 4)", "tests/experiments/test_ablation.py"),
    Mutant("rate chosen by pairs that were learned", VARIANTS, "lr, kept, bench.steps)", "lr, order, bench.steps)", "tests/experiments/test_ablation.py"),
    Mutant("two groups for a little padding on a GPU", "clip_medical/towers.py", "(2 / 3 if device.type == \"cuda\" else 1)", "1", "tests/test_towers.py"),
    Mutant("attention on a CPU not counted", "experiments/flops.py", "custom_mapping=unknown", "custom_mapping={}", "tests/experiments/test_flops.py"),
    Mutant("rank changes the step size", VARIANTS, "alpha = config.alpha * rank / config.rank", "alpha = config.alpha", "tests/experiments/test_ablation.py"),
    Mutant("rows of other settings taken over", ABLATION, 'stored if stored.get("settings") == settings else {}', "stored", "tests/experiments/test_ablation.py"),
    Mutant("equal fragments are wrong for each other", BATCHES, "(self.caption_ids, self.image_ids, self.text_ids)", "(self.caption_ids, self.image_ids)", "tests/data/test_fragments.py"),
    Mutant("weight of the fragments left out", CONTRASTIVE, "scale(weight * loss)", "scale(loss)", "tests/training/test_contrastive.py"),
    Mutant("gradient of the captions lost to that of their fragments", CONTRASTIVE, "to_images += part[1]", "to_images = part[1]", "tests/training/test_contrastive.py"),
    Mutant("the same fragment over and over", FRAGMENTS, "(seed, epoch, 1 + number)", "(seed, epoch, 1)", "tests/data/test_fragments.py"),
    Mutant("each fragment with the whole weight", BATCHES, "weight=1 / config.fragments", "weight=1", "tests/data/test_fragments.py"),
    Mutant("argmax on ties in zero-shot", ZERO_SHOT, "hits = (ranks_in_list(class_scores(clip, facet, classes, images[known]), truth) == 0).double()", "hits = (class_scores(clip, facet, classes, images[known]).argmax(dim=1) == truth).double()", "tests/evaluation/test_zero_shot.py"),
    Mutant("synonyms of one class counted to the next", ZERO_SHOT, "features.split([len(group) for group in groups])", "features.split(len(groups[0]))", "tests/evaluation/test_zero_shot.py"),
    Mutant("modalities of an anatomy averaged", ZERO_SHOT, ".logsumexp(dim=2) - math.log(cosines.shape[2])", ".mean(dim=2)", "tests/evaluation/test_zero_shot.py"),
    Mutant("joint list: NaN comes first", ZERO_SHOT, "    if not scores.isfinite().all():", "    if False:", "tests/evaluation/test_zero_shot.py"),
    Mutant("views drawn with the numbers of a fragment", "clip_medical/data/augment.py", "(seed, epoch, 0, 1)", "(seed, epoch, 2)", "tests/data/test_augment.py"),
    Mutant("peak of the parent taken for one's own", "clip_medical/training/memory.py", 'line.startswith("VmHWM")', 'line.startswith("none")', "tests/training/test_memory.py"),
    Mutant("fragments from anywhere in the caption", FRAGMENTS, ".clamp(max=FIRST)", "", "tests/data/test_fragments.py"),
    Mutant("words cut in two", FRAGMENTS, "inner & ends_word[tokens]", "inner", "tests/data/test_fragments.py"),
    Mutant("a word cut off by the context length is lost", FRAGMENTS, "torch.where(inner, word + 1, 0).amax(dim=1)", "ended.sum(dim=1)", "tests/data/test_fragments.py"),
    Mutant("a word ends where none does", BATCHES, 'token.endswith("</w>")', 'not token.endswith("</w>")', "tests/data/test_fragments.py"),
    Mutant("fragments that never end with the last word", FRAGMENTS, "(words - count + 1)", "(words - count)", "tests/data/test_fragments.py"),
    Mutant("fragment without its end", FRAGMENTS, "torch.where(column <= size[:, None],", "torch.where(column <= size[:, None] + 1,", "tests/data/test_fragments.py"),
]  # fmt: skip


NONE = Mutant("no mistake at all", LAYER, '"""LoRA, the layer', '"""LoRA, the layer', "tests")


def survives(mutant: Mutant) -> bool:
    """Whether the tests pass although the mistake is in the code."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info", ".*_cache"))
        file = copy / mutant.file
        text = file.read_text()
        if text.count(mutant.right) != 1:
            sys.exit(
                f"{mutant.mistake}: {mutant.file} holds {mutant.right!r} {text.count(mutant.right)} times, not once"
            )
        file.write_text(text.replace(mutant.right, mutant.wrong))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests.split()]
        code = subprocess.run(command, cwd=copy, capture_output=True).returncode
        if code not in (0, 1):
            sys.exit(f"{mutant.mistake}: pytest could not run the tests (exit code {code})")
        return code == 0


def main() -> None:
    if not survives(NONE):
        sys.exit("the tests fail without any mistake: mend that first, or every mistake would seem to be caught")
    survivors = 0
    for mutant in MUTANTS:
        alive = survives(mutant)
        survivors += alive
        print(f"{'SURVIVES' if alive else 'caught  '}  {mutant.mistake}", flush=True)
    sys.exit(f"{survivors} of {len(MUTANTS)} mistakes went unnoticed" if survivors else None)


if __name__ == "__main__":
    main()
