"""Check that the tests catch known mistakes: `make mutants` applies each to a copy of the project and runs its test.

A test that never fails proves nothing. Each row of MUTANTS is a mistake that LoRA or CLIP code has made, or could make
without an error message: the text in the file, the wrong text, and the test that has to fail. The results are written
to tests/MUTANTS.md. tests/test_mutants_match.py checks in every test run that the rows still fit the code.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "MUTANTS.md"
PROCESSES = 2  # mutants tested at a time
PROJECT = ("lora", "clip_medical", "experiments", "tests", "train.py", "pyproject.toml")  # what a copy holds


class Mutant(NamedTuple):
    """One mistake."""

    mistake: str
    harm: str  # what it does to a user
    file: str
    right: str  # occurs once in the file
    wrong: str
    test: str  # in tests/: file::function


LAYER, INJECT, FILE = "lora/layer.py", "lora/inject.py", "lora/peft_format.py"
TEST_LAYER, TEST_INJECT, TEST_FILE = "lora/test_layer.py::", "lora/test_inject.py::", "lora/test_peft_format.py::"
LOSS, GRAD_CACHE = "clip_medical/training/loss.py", "clip_medical/training/grad_cache.py"
TEST_LOSS, TEST_GRAD_CACHE = "training/test_loss.py::", "training/test_grad_cache.py::"
OPTIMIZER, TRAINER = "clip_medical/training/optimizer.py", "clip_medical/training/trainer.py"
TEST_OPTIMIZER, TEST_TRAINER = "training/test_optimizer.py::", "training/test_trainer.py::"
FLIGHT_CHECK, TEST_FLIGHT_CHECK = "clip_medical/training/flight_check.py", "training/test_flight_check.py::"
MODEL, PROCESSOR, RUN_FOLDER = "clip_medical/model.py", "clip_medical/data/processor.py", "clip_medical/run_folder.py"
PACKED, CHECK = "clip_medical/fast/packed.py", "clip_medical/fast/check.py"
EQUAL_TO_REFERENCE = "fast/test_parity.py::test_features_and_gradients_equal_the_reference"
BATCHES = "clip_medical/data/batches.py"
CACHE, DICOM = "clip_medical/data/cache.py", "clip_medical/data/dicom.py"
DATASET, SPLITS = "clip_medical/data/dataset.py", "clip_medical/data/splits.py"
RETRIEVAL, TEST_RETRIEVAL = "clip_medical/evaluation/retrieval.py", "evaluation/test_retrieval.py::"
CLASSIFICATION, TEST_CLASSIFICATION = "clip_medical/evaluation/classification.py", "evaluation/test_classification.py::"
ZERO_SHOT, TEST_ZERO_SHOT = "clip_medical/evaluation/zero_shot.py", "evaluation/test_zero_shot.py::"
EXPORT, MERGED, ONNX = (f"clip_medical/export/{name}.py" for name in ("__main__", "merged", "onnx"))

MUTANTS = [
    # The LoRA layer
    Mutant("B starts random instead of zero", "training starts from a damaged model",
           LAYER, "torch.zeros(base.out_features, rank,", "torch.randn(base.out_features, rank,",
           TEST_LAYER + "test_a_new_layer_is_its_base"),
    Mutant("A starts at zero, as B does", "both gradients are zero and nothing is learned",
           LAYER, "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))", "nn.init.zeros_(self.lora_A)",
           TEST_LAYER + "test_A_has_no_gradient_at_the_first_step_and_some_at_the_second"),
    Mutant("alpha is not divided by r", "each rank needs another learning rate",
           LAYER, "self.alpha / (math.sqrt(rank) if rslora else rank)", "self.alpha",
           TEST_LAYER + "test_forward_is_the_formula"),
    Mutant("dropout on the input of the base layer", "the pretrained function itself is disturbed",
           LAYER, "y: Tensor = self.base(x)", "y: Tensor = self.base(F.dropout(x, self.dropout, self.training))",
           TEST_LAYER + "test_dropout_leaves_the_base_path_alone"),
    Mutant("A in the half precision of the base", "small steps are rounded away",
           LAYER, "torch.empty(rank, base.in_features, device=device, dtype=torch.float32)",
           "torch.empty(rank, base.in_features, device=device, dtype=base.weight.dtype)",
           TEST_LAYER + "test_half_precision_base_keeps_fp32_adapters"),
    Mutant("a layer added to a model in eval mode is in training mode", "dropout is live in evaluation",
           LAYER, "        self.train(base.training)  #", "        #",
           TEST_LAYER + "test_the_base_is_frozen_and_mode_and_device_are_inherited"),
    Mutant("strength 0 multiplies by zero", "NaN of a diverged adapter reaches the base model",
           LAYER, "        if self.strength == 0:\n            return y ", "        if False:\n            return y ",
           TEST_LAYER + "test_strength_zero_is_the_base_bit_for_bit"),
    Mutant("the merge writes into the base weight", "a second merge adds B A again",
           LAYER, "        found = new(x)\n", "        found = new(x)\n        layer.base.weight.copy_(new.weight)\n",
           TEST_LAYER + "test_merging_mutates_nothing_and_gives_the_same_twice"),
    # Injection
    Mutant("targets match as substrings", "layers are adapted that nobody chose",
           INJECT, 'rf"(.*\\.)?({endings})"', 'rf".*({endings}).*"',
           TEST_INJECT + "test_names_are_matched_whole_and_returned_in_module_order"),
    Mutant("the base is not frozen", "all weights are trained, and the adapter file holds A and B only",
           INJECT, "    model.requires_grad_(False)  #", "    pass  #",
           TEST_INJECT + "test_everything_but_the_adapters_is_frozen"),
    # The adapter file
    Mutant("missing and unexpected tensors are accepted", "the adapted model is partly its base",
           FILE, "    _check_tensors(tensors, {key: tuple(parameter.shape) for key, parameter in expected.items()})\n", "",
           TEST_FILE + "test_tensors_that_are_refused"),
    Mutant("use_rslora is ignored on loading", "the adapter is applied at a fraction of its strength",
           FILE, 'config["lora_dropout"], config["use_rslora"])', 'config["lora_dropout"], False)',
           TEST_FILE + "test_round_trip_is_bit_equal"),
    Mutant("unknown config fields are ignored", "a DoRA adapter is computed as plain LoRA",
           FILE, "        if not known and value not in HARMLESS.get(field, EMPTY):", "        if False:",
           TEST_FILE + "test_configs_that_are_refused"),
    # Loss, gradient and optimizer
    Mutant("exp of logit_scale is forgotten", "the temperature is 20 times too high and learning is slow",
           LOSS, "device=image_features.device).exp()", "device=image_features.device)",
           TEST_LOSS + "test_equals_the_loss_of_transformers"),
    Mutant("image-to-text loss counted twice, text-to-image not at all", "text queries are not trained",
           LOSS, "text_to_image = (scale * text_features, image_features, positives.T)", "text_to_image = image_to_text",
           TEST_LOSS + "test_swapping_images_and_texts_changes_nothing"),
    Mutant("pairs with an equal caption are negatives", "correct matches are penalised",
           LOSS, ".any(dim=0)", ".all(dim=0)",
           TEST_LOSS + "test_pairs_with_the_same_caption_or_the_same_image_are_positives"),
    Mutant("mean over the positives outside the logarithm", "a perfect model keeps a loss above 0",
           LOSS, "logits.logsumexp(dim=1) - of_positives.logsumexp(dim=1)",
           "logits.logsumexp(dim=1) - (logits * positives).sum(dim=1) / positives.sum(dim=1)",
           TEST_LOSS + "test_multi_positives_by_hand"),
    Mutant("random state not restored for the second pass", "the gradient belongs to other dropout masks",
           GRAD_CACHE, "            restore(state)\n", "",
           TEST_GRAD_CACHE + "test_gradients_in_chunks_equal_those_of_one_graph"),
    Mutant("weight of the fragments left out", "fragments outweigh the captions",
           GRAD_CACHE, "captions.weight * loss(", "loss(",
           TEST_GRAD_CACHE + "test_each_fragment_adds_a_weighted_loss_of_its_own"),
    Mutant("reentrant checkpointing over frozen inputs", "the adapter gets no gradient",
           MODEL, "use_reentrant=False", "use_reentrant=True",
           TEST_GRAD_CACHE + "test_gradients_are_the_same_with_checkpointing"),
    Mutant("the schedule counts skipped steps", "the learning rate decays ahead of the training",
           OPTIMIZER, "if self.scaler.get_scale() >= before:", "if True:",
           TEST_OPTIMIZER + "test_a_step_that_overflows_moves_neither_weights_nor_schedule"),
    Mutant("the gradient is clipped before it is unscaled", "every fp16 step is clipped to almost nothing",
           OPTIMIZER, "        self.scaler.unscale_(self.adamw)\n", "",
           TEST_OPTIMIZER + "test_the_gradient_is_unscaled_before_it_is_clipped"),
    Mutant("a gradient of NaN is applied", "one bad batch destroys all weights",
           OPTIMIZER, "if norm.isfinite() or self.scaler.is_enabled():", "if True:",
           TEST_OPTIMIZER + "test_without_loss_scaling_a_gradient_that_is_not_finite_moves_nothing"),
    Mutant("Adam's moments are not restored on resuming", "a resumed run ends with other weights",
           OPTIMIZER, '        self.adamw.load_state_dict(state["adamw"])\n', "",
           TEST_OPTIMIZER + "test_a_loaded_state_continues_like_the_original"),
    Mutant("the flight check accepts missing gradients", "hours of training change nothing",
           FLIGHT_CHECK, ' and n not in reached]', " and False]",
           TEST_FLIGHT_CHECK + "test_a_layer_without_gradient_is_named"),
    Mutant("the flight check accepts gradients in frozen weights", "the adapter file lacks a part of what was trained",
           FLIGHT_CHECK, "sorted(reached & frozen)", "[]",
           TEST_FLIGHT_CHECK + "test_a_gradient_in_a_frozen_weight_is_named"),
    Mutant("fp16 steps are skipped without end", "a run ends untrained without an error",
           TRAINER, " and optimizer.scaler.get_scale() <= 1:", " and not optimizer.scaler.is_enabled():",
           TEST_TRAINER + "test_fp16_does_not_skip_steps_forever"),
    Mutant("the random state is not restored on resuming", "a resumed run ends with other weights",
           TRAINER, '        restore(state["random"][distributed.rank() % len(state["random"])])\n', "",
           TEST_TRAINER + "test_a_stopped_run_continues_to_the_bit"),
    # Model and encoders
    Mutant("features are not normalised", "cosine similarities above 1, wrong rankings",
           MODEL, "return F.normalize(self.encoder.image(self.model, self.normalised(pixels)).float(), dim=-1)",
           "return self.encoder.image(self.model, self.normalised(pixels)).float()",
           "test_model.py::test_features_have_unit_length_and_fp32"),
    Mutant("pixels are normalised with means for 0 to 1", "the model sees saturated images",
           PROCESSOR, "255 * torch.tensor(value)", "torch.tensor(value)",
           "test_model.py::test_features_equal_those_of_transformers"),
    Mutant("the temperature is cast with the weights", "a scale of 100 becomes 98.9 in bf16",
           MODEL, "model.logit_scale.data = scale.to(device)", "model.logit_scale.data = model.logit_scale.data.float()",
           "test_model.py::test_features_have_unit_length_and_fp32"),
    Mutant("probabilities without the temperature", "all labels look equally likely",
           MODEL, "(self.scale(CAPTIONS) * cosines)", "(cosines)",
           "export/test_from_python.py::test_classify_is_a_softmax_at_the_temperature_of_the_model"),
    Mutant("fast encoder: text attends to later tokens", "features differ from those of CLIP",
           PACKED, "is_causal=causal, scale", "scale",
           EQUAL_TO_REFERENCE),
    Mutant("fast encoder: the end token attends to padding", "a feature depends on the other captions of the batch",
           PACKED, "unpack(value[0], packing), packing.valid", "unpack(value[0], packing), None",
           EQUAL_TO_REFERENCE),
    Mutant("fast encoder: query of a token other than the end token", "the text feature is that of a start token",
           PACKED, "hidden[0].index_select(0, packing.end)", "hidden[0, : len(packing.end)]",
           EQUAL_TO_REFERENCE),
    Mutant("fast encoder: captions that share a token but no prefix share its row", "a caption gets words of another",
           PACKED, "(ids[1:] == ids[:-1]).cumprod(dim=1) == 0", "ids[1:] != ids[:-1]",
           EQUAL_TO_REFERENCE),
    Mutant("the encoder check runs with B = 0", "an error in the branch stays unnoticed",
           CHECK, "p.data += 0.05 * torch", "p.data += 0 * torch",
           "fast/test_check.py::test_an_edit_of_the_layer_is_seen"),
    Mutant("the encoder check compares no gradients", "correct features, but wrong training",
           CHECK, "for layer in lora_layers(model).values() for p in layer.parameters() if p.requires_grad]",
           "for layer in () for p in layer.parameters()]",
           "fast/test_check.py::test_different_numbers_are_found"),
    Mutant("fast encoder in spite of LoRA dropout", "captions with a common prefix share their dropout masks",
           CHECK, "if getattr(module, \"dropout\", 0):", "if False:",
           "fast/test_check.py::test_the_reference_takes_over_and_the_reason_is_named"),
    # Data
    Mutant("a resumed run starts the epoch anew", "some pairs are seen twice, others never",
           BATCHES, "first = start % batches_per_epoch if", "first = 0 if",
           "data/test_batches.py::test_rows_continue_at_any_position"),
    Mutant("equal fragments are negatives of each other", '"CT" counts as wrong for another CT image',
           BATCHES, "[*ids, equal_texts]", "ids",
           "data/test_fragments.py::test_equal_fragments_are_positives_of_each_other"),
    Mutant("the cache key ignores the files", "old pixels are used after an image has changed",
           CACHE, "json.dumps([FORMAT, size, split.origins])", "json.dumps([FORMAT, size, len(split.origins)])",
           "data/test_cache.py::test_the_key_changes_with_the_pixels"),
    Mutant("a grey image among coloured ones fills one channel", "two channels hold random memory",
           CACHE, "                image[self.channels[row] :] = image[0]", "                pass",
           "data/test_cache.py::test_grey_and_coloured_images_in_one_batch"),
    Mutant("pixels of a killed pass are kept", "images are paired with the pixels of others",
           CACHE, "pixels.seek(pixels.truncate(size * size * sum(record.channels for record in records)))", "pass",
           "data/test_cache.py::test_every_state_that_a_kill_can_leave"),
    Mutant("MONOCHROME1 is not inverted", "X-rays become negatives",
           DICOM, 'dataset.PhotometricInterpretation == "MONOCHROME1"', "False",
           "data/test_dicom.py::test_monochrome1_is_inverted"),
    Mutant("the validation split is drawn by image, not by patient", "recall too high: patients are in both splits",
           DATASET, "owners.setdefault(n, p or image)", "owners.setdefault(n, image)",
           "data/test_dataset.py::test_patients_stay_in_one_split"),
    Mutant("the validation split is drawn by row", "recall too high: images are in both splits",
           SPLITS, "members.setdefault(group, [])", "members.setdefault(str(row), [])",
           "data/test_dataset.py::test_rows_of_one_image_stay_in_one_split"),
    # Metrics
    Mutant("ties count for the model", "recall too high by the ties: 100 % for constant features",
           RETRIEVAL, "similarity >= best[:, None]", "similarity > best[:, None]",
           TEST_RETRIEVAL + "test_collapsed_features_score_nothing"),
    Mutant("NaN features are accepted", "a diverged model has a recall of 100 %",
           RETRIEVAL, "if features.numel() and not torch.stack(features.aminmax()).isfinite().all():", "if False:",
           TEST_RETRIEVAL + "test_features_that_are_not_finite_are_refused"),
    Mutant("images with an equal caption are negatives", "recall too low where captions repeat",
           RETRIEVAL, "keys, caption = np.unique(caption_ids.numpy(), return_inverse=True)",
           "keys = caption = np.arange(len(caption_ids))",
           TEST_RETRIEVAL + "test_same_caption_is_a_positive"),
    Mutant("captions of one image are resampled independently", "confidence intervals too narrow",
           RETRIEVAL, "share(metric(rank), groups[way])", "share(metric(rank))",
           TEST_RETRIEVAL + "test_captions_of_one_image_are_resampled_together"),
    Mutant("dropout is on during evaluation", "noisy features and recall too low",
           "clip_medical/evaluation/encode.py", "    clip.model.eval()\n", "",
           "evaluation/test_encode.py::test_features_are_those_of_evaluation_mode"),
    Mutant("argmax on ties", "accuracy too high: constant scores predict the first class",
           CLASSIFICATION, "p[rows, true] > rivals", "p[rows, true] >= rivals",
           TEST_CLASSIFICATION + "test_uninformative_scores_have_no_accuracy"),
    Mutant("AUROC counts ties for the model", "AUROC too high: 1 for constant scores",
           CLASSIFICATION, "negatives.cumsum() - negatives / 2", "negatives.cumsum()",
           TEST_CLASSIFICATION + "test_areas_equal_those_of_scikit_learn"),
    Mutant("calibration error not weighted by bin size", "a few rare predictions decide the error",
           CLASSIFICATION, 'sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in filled) / len(hits)',
           'sum(abs(b["confidence"] - b["accuracy"]) for b in filled) / len(filled)',
           TEST_CLASSIFICATION + "test_calibration_by_hand"),
    Mutant("prompts of all modalities of an anatomy averaged", "accuracy too low: the mean describes no image",
           ZERO_SHOT, "torch.logsumexp(scale * cosines, dim=2)", "(scale * cosines).mean(dim=2)",
           TEST_ZERO_SHOT + "test_probabilities_of_groups_are_added"),
    Mutant("learning rates are selected on the pairs they were trained on", "the rate that overfits most wins",
           "experiments/ablation.py", "fit(bench, variant, lr, train)", "fit(bench, variant, lr, order)",
           "experiments/test_ablation.py::test_held_back_pairs_are_not_trained_on"),
    # Runs and exports
    Mutant("the base of an adapter is not checked", "an adapter is applied to weights it was not trained on",
           RUN_FOLDER, "if expected != clip.fingerprint:", "if False:",
           "export/test_command.py::test_a_user_error_is_one_line_and_writes_nothing"),
    Mutant("the trained temperature is not exported", "probabilities differ from those of the run",
           RUN_FOLDER, "(CONFIG_FILE, WEIGHTS_FILE, SCALE, PROVENANCE, CALIBRATION)", "(CONFIG_FILE, WEIGHTS_FILE, PROVENANCE)",
           "export/test_adapter.py::test_load_run_restores_the_run"),
    Mutant("weights are cast before the merge", "an fp16 export is rounded twice",
           MERGED, "    merge(clip.model)\n    merge_error", "    clip.model.to(dtype)\n    merge(clip.model.float())\n    merge_error",
           "export/test_merged.py::test_fp16_is_cast_once_after_the_merge"),
    Mutant("an export is written under its final name", "an interrupted export looks complete",
           EXPORT, "part = Path(temporary, folder.name)", "part = folder",
           "export/test_command.py::test_an_interrupted_export_leaves_nothing"),
    Mutant("upload without --yes", "a model is published by mistake",
           EXPORT, "    if not confirmed:", "    if False:",
           "export/test_push.py::test_a_dry_run_lists_the_files_and_uploads_nothing"),
    Mutant("batch size and length are constants in ONNX", "the exported encoder only runs on batches of 3",
           ONNX, ", dynamic_shapes=((axes,) * len(inputs),)", "",
           "export/test_onnx.py::test_features_match_at_every_batch_size_and_length"),
    Mutant("ONNX features are not compared", "an encoder that computes something else is published",
           ONNX, "if not difference < TOLERANCE:", "if False:",
           "export/test_onnx.py::test_an_encoder_that_differs_is_not_saved"),
]  # fmt: skip
# clip_medical/fast may be deleted
MUTANTS = [mutant for mutant in MUTANTS if (ROOT / mutant.file).parent.is_dir()]


def misfits() -> list[str]:
    """Return a message for each mutant whose text does not occur exactly once in its file, or whose test is missing."""
    messages = []
    for mutant in MUTANTS:
        file, function = mutant.test.split("::")
        code, tests = (path.read_text(encoding="utf-8") if path.is_file() else ""
                       for path in (ROOT / mutant.file, ROOT / "tests" / file))  # fmt: skip
        if (times := code.count(mutant.right)) != 1:
            messages.append(f"{mutant.mistake}: {mutant.file} contains {mutant.right!r} {times} times, expected once.")
        if f"def {function}(" not in tests:
            messages.append(f"{mutant.mistake}: tests/{mutant.test} does not exist.")
    return messages


def copy_project(target: Path) -> Path:
    """Copy the project to a new folder, and return it."""
    target.mkdir()
    for source in (ROOT / name for name in PROJECT):
        if source.is_dir():
            shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, target)
    return target


def failing_test(copies: Queue[Path], tests: Sequence[str], mutant: Mutant | None = None) -> str:
    """Run tests in a copy of the project, with a mistake if one is given. Returns the test that fails, "" if none."""
    copy = copies.get()
    try:
        if mutant is None:
            return run_pytest(copy, tests)
        file = copy / mutant.file
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace(mutant.right, mutant.wrong), encoding="utf-8")
        failed = run_pytest(copy, tests)
        file.write_text(text, encoding="utf-8")
        return failed
    finally:
        copies.put(copy)


def run_pytest(copy: Path, tests: Sequence[str]) -> str:
    """Run tests of a copy until one fails, and return its name. Raises RuntimeError if they cannot be run."""
    # The copy's pyproject.toml puts the copy first on sys.path, before an installed version of the project.
    options = ["-x", "-q", "--tb=short", "-rfE", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{test}" for test in tests)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # one core each, no stale .pyc
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+?::\w+)", run.stdout, re.MULTILINE)
    if run.returncode != bool(failed):
        raise RuntimeError(f"pytest cannot run {' '.join(tests)}:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
    return failed[1] if failed else ""


def main() -> None:
    if messages := misfits():
        sys.exit("\n".join([*messages, "Correct these rows of tests/mutants.py. No test was run."]))
    tests = sorted({mutant.test for mutant in MUTANTS})
    copies: Queue[Path] = Queue()
    with TemporaryDirectory() as folder, ThreadPoolExecutor(PROCESSES) as pool:
        for number in range(PROCESSES):
            copies.put(copy_project(Path(folder, str(number))))
        shares = [tests[number::PROCESSES] for number in range(PROCESSES)]
        if failed := "".join(pool.map(lambda share: failing_test(copies, share), shares)):
            sys.exit(f"{failed} fails without a mistake. Correct that first.")
        rows, survivors = [], 0
        results = pool.map(lambda mutant: failing_test(copies, [mutant.test], mutant), MUTANTS)
        for mutant, failed in zip(MUTANTS, results, strict=True):
            print(f"{'caught  ' if failed else 'SURVIVES'}  {mutant.mistake}", flush=True)
            survivors += not failed
            rows.append(f"| {mutant.mistake} | {mutant.harm} | {f'`{failed}`' if failed else '**no test**'} |")
    head = ["| mistake | what it does to a user | caught by |", "|---|---|---|"]
    TABLE.write_text("\n".join(["Written by `make mutants`.", "", *head, *rows, ""]), encoding="utf-8")
    sys.exit(f"{survivors} of {len(MUTANTS)} mistakes survive." if survivors else None)


if __name__ == "__main__":
    main()
