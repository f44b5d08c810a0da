"""Advice for a prompt and for a data set, and what it says about itself."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from deepinsert.controller.option_checks import check
from deepinsert.controller.options import RecommendOptions, TrainPolicyOptions
from deepinsert.controller.policy.advice import advise, nearest_candidate
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.policy.policy_pictures import plot_pareto
from deepinsert.controller.policy.recommend import run, table_of
from deepinsert.controller.policy.sentences import policy_sentence
from deepinsert.controller.prompt_selection import image_prompts
from deepinsert.controller.runs.folder import start_run
from deepinsert.controller.statistics import Interval
from deepinsert.envs.observations import prompt_embeddings
from deepinsert.envs.rewards.keys import prompt_keys
from deepinsert.envs.rewards.table import RewardTable
from deepinsert.envs.skip_weights import SkipWeights

LAYERS = (0, 1, 2, 3, 5)


@pytest.fixture(scope="module")
def prompts(rendered_data):
    return image_prompts(RecommendOptions(out=rendered_data.parent, policy=rendered_data, data=rendered_data))


def bears(prompt):
    """Prompts of source "gqa" bear layer 1, others layer 3."""
    return 1 if prompt.source == "gqa" else 3


@pytest.fixture(scope="module")
def table(tiny_backbone, prompts):
    """The real prompts and FLOPs, with losses that rise by 1 nat a layer beyond what a prompt bears."""
    table = RewardTable(tiny_backbone, prompts[0], LAYERS)
    limits = np.array([[bears(prompt)] for prompt in prompts[0]])
    noise = [int(key, 16) / 16**16 / 50 for key in table.prompt_keys]  # equal for equal prompts
    table.losses[:] = 0.5 + np.array(noise)[:, None] + np.maximum(0, np.array(LAYERS) - limits)
    table.correct[:] = table.losses < 1
    assert table.flops.all()
    return table


@pytest.fixture(scope="module")
def policy(tiny_backbone, prompts, table, fit):
    """Tells the sources apart, for skip weights 0.1 to 1."""
    observations = prompt_embeddings(tiny_backbone, prompts[0])
    identity = (tiny_backbone.name, tiny_backbone.fingerprint)
    fitted = fit(table, observations, SkipWeights(0.1, 1.0), identity)
    return dataclasses.replace(fitted, backbone=tiny_backbone, table_digest=table.digest)


@pytest.fixture(scope="module")
def policy_folder(policy, table, tmp_path_factory):
    """A run folder as train-policy leaves it."""
    folder = tmp_path_factory.mktemp("policy")
    policy.save(folder)
    table.save(folder / "table")
    return folder


@pytest.fixture(scope="module")
def policy_alone(policy, tmp_path_factory):
    """A policy without the table it was trained on."""
    folder = tmp_path_factory.mktemp("alone")
    policy.save(folder)
    return folder


def of_losses(table, losses, flops=True):
    """A table of other losses about the same prompts."""
    return RewardTable.from_losses(
        losses,
        LAYERS,
        table.num_layers,
        flops=table.flops if flops else None,
        image_keys=table.image_keys,
        prompt_keys=table.prompt_keys,
    )


def test_without_rewards_the_layer_nearest_to_the_policys_mean_is_taken(policy, prompts):
    result = advise(policy, prompts[0])
    layers = [row["insert_layer"] for row in result["per_prompt"]]
    sources = [prompt.source for prompt in prompts[0]]
    assert [row["source"] for row in result["per_prompt"]] == sources
    assert [row["id"] for row in result["per_prompt"]] == [prompt.id for prompt in prompts[0]]
    assert result["chosen_by"] == "mean of the policy's layers" and result["undecided"] is None
    assert result["mean_insert_layer"] == pytest.approx(np.mean(layers))
    assert result["insert_layer"] == min(LAYERS, key=lambda layer: abs(layer - np.mean(layers)))
    assert result["confidence_interval"] == result["mean_interval"]
    low, high = result["confidence_interval"]
    assert low <= result["mean_insert_layer"] <= high
    assert result["mean_depth"] == pytest.approx(np.mean(layers) / policy.num_layers)
    for source, counts in result["histogram"].items():
        chosen = [layer for layer, name in zip(layers, sources, strict=True) if name == source]
        assert counts == {str(layer): chosen.count(layer) for layer in LAYERS}


def test_policy_told_the_sources_apart(policy, prompts):
    rows = advise(policy, prompts[0])["per_prompt"]
    right = [row["insert_layer"] == bears(prompt) for row, prompt in zip(rows, prompts[0], strict=True)]
    assert np.mean(right) > 0.85


def test_expectations_without_rewards_are_the_training_tables(policy, prompts):
    result = advise(policy, prompts[0][:8], skip_weight=0.3)
    column = LAYERS.index(result["insert_layer"])
    assert result["skip_weight"] == 0.3
    assert result["expected"]["loss"] == policy.training.loss[column]
    assert result["expected"]["flops_ratio"] == policy.training.flops_ratio[column]
    assert result["expected"]["reward"] == pytest.approx(policy.mean_rewards(0.3)[column])
    assert result["best_fixed"]["insert_layer"] == LAYERS[policy.mean_rewards(0.3).argmax()]


@pytest.mark.parametrize("weight", [0.1, 0.6, 1.0])
def test_with_rewards_the_best_fixed_layer_is_taken(policy, prompts, table, weight):
    result = advise(policy, prompts[0], skip_weight=weight, table=table)
    rewards = table.rewards(weight)
    best = rewards.mean(axis=0).argmax()
    assert result["chosen_by"] == "reward table" and result["insert_layer"] == LAYERS[best]
    assert LAYERS[best] in result["undecided"]
    assert result["confidence_interval"] == [result["undecided"][0], result["undecided"][-1]]
    assert sum(result["picked"].values()) == pytest.approx(1)
    for column, layer in enumerate(LAYERS):
        difference = result["difference"][layer]
        wanted = (rewards[:, column] - rewards[:, best]).mean()
        assert difference["reward"] == pytest.approx(wanted)
        low, high = difference["confidence_interval"]
        assert (layer in result["undecided"]) == (low <= 0 <= high)
    expected = result["expected"]
    assert expected["loss"] == pytest.approx(table.losses[:, best].mean())
    assert expected["flops_ratio"] == pytest.approx(table.flops_ratio[:, best].mean())
    assert expected["reward"] == pytest.approx(rewards[:, best].mean())
    assert expected["accuracy"] == pytest.approx(table.correct[:, best].mean())
    chosen = [LAYERS.index(row["insert_layer"]) for row in result["per_prompt"]]
    assert result["policy"]["reward"] == pytest.approx(rewards[np.arange(len(rewards)), chosen].mean())


def test_a_policy_worth_asking_on_enough_data_raises_no_doubt(policy, prompts, table):
    result = advise(policy, prompts[0], table=table)
    assert result["images"] >= 20 and result["policy"]["minus_fixed"]["confidence_interval"][0] > 0
    assert result["caveat"] is None
    assert f"Insert layer {result['insert_layer']} earned the most" in result["verdict"]
    assert "choosing a layer for each prompt earned more" in result["verdict"]


def test_a_policy_that_does_not_beat_the_fixed_layer_is_said_to(policy, prompts, table):
    """Losses that punish every layer but 2, whatever the prompt."""
    losses = 0.5 + np.abs(np.array(LAYERS) - 2) + table.losses[:, :1]
    result = advise(policy, prompts[0], table=of_losses(table, losses))
    assert result["insert_layer"] == 2 and result["undecided"] == [2]
    assert result["caveat"] == (
        "Choosing a layer for each prompt did not beat insert layer 2 for all, so one fixed layer is as good."
    )
    assert "did not beat it (-" in result["verdict"]


def test_a_policy_that_always_takes_the_fixed_layer_is_said_to(policy, prompts, table):
    (weight, bias), *others = policy.network
    head, offset = others[-1]
    always = dataclasses.replace(
        policy, network=((weight, bias), (head, offset + 1000 * (np.array(LAYERS) == 1).astype(np.float32)))
    )
    losses = 0.5 + np.abs(np.array(LAYERS) - 1) + table.losses[:, :1]
    result = advise(always, prompts[0], table=of_losses(table, losses))
    assert "comes to the same as insert layer 1 for all." in result["caveat"]
    assert result["mean_insert_layer"] == 1 and "chooses it for every prompt" in result["verdict"]


def test_few_images_are_said_to_be_few(policy, prompts, table):
    images = sorted(set(table.image_keys))[:6]
    rows = np.array([key in images for key in table.image_keys])
    some = [prompt for prompt, kept in zip(prompts[0], rows, strict=True) if kept]
    result = advise(policy, some, table=table.subset(rows))
    assert result["images"] == 6 and result["caveat"].startswith(
        ("With only 6 images", "6 images do not tell")
    )
    alone = advise(policy, some)
    assert alone["caveat"].startswith("With only 6 images the mean of the policy's layers says little")
    assert advise(policy, prompts[0])["caveat"] is None


def test_layers_that_the_data_cannot_tell_apart_are_named(policy, prompts, table):
    losses = np.random.default_rng(1).gamma(2.0, 0.4, size=table.losses.shape)
    result = advise(policy, prompts[0], skip_weight=0.1, table=of_losses(table, losses))
    assert len(result["undecided"]) > 2
    assert "24 images do not tell insert layers" in result["caveat"]
    assert "prompts do not tell it from" in result["verdict"]


def test_without_rewards_a_policy_that_did_not_beat_the_fixed_layer_is_doubted(policy, prompts):
    lost = judged(policy, Interval(-0.01, -0.02, 0.0))
    assert "did not beat the best fixed layer" in advise(lost, prompts[0])["caveat"]
    won = judged(policy, Interval(0.02, 0.01, 0.03))
    assert advise(won, prompts[0])["caveat"] is None


def test_the_policy_is_judged_on_what_it_has_not_seen(policy, prompts, table):
    held_out = np.arange(len(table)) % 3 == 0
    result = advise(policy, prompts[0], table=table, held_out=held_out)
    rewards = table.rewards(1.0)
    chosen = np.array([LAYERS.index(row["insert_layer"]) for row in result["per_prompt"]])
    earned = rewards[np.arange(len(rewards)), chosen] - rewards[:, LAYERS.index(result["insert_layer"])]
    assert result["policy"]["minus_fixed"]["reward"] == pytest.approx(earned[held_out].mean())
    assert result["policy"]["judged_on"]["prompts"] == held_out.sum() == result["pareto"]["prompts"]
    assert (
        f"On the {held_out.sum()} held-out ones of these prompts" in result["verdict"]
        and result["caveat"] is None
    )
    few = sorted(set(table.image_keys))[:5]
    seen_few = advise(
        policy, prompts[0], table=table, held_out=np.array([key in few for key in table.image_keys])
    )
    assert seen_few["caveat"] == (
        "That choosing a layer for each prompt earns more rests on 5 images, which says little."
    )


def test_a_table_without_flops_draws_no_pareto_picture(policy, prompts, table):
    result = advise(policy, prompts[0], table=of_losses(table, table.losses, flops=False))
    assert result["pareto"] is None and result["expected"]["flops_ratio"] is None


def test_without_rewards_the_pareto_picture_is_that_of_training(policy, prompts, table, tmp_path):
    assert advise(policy, prompts[0])["pareto"] is None  # never measured over its skip weights
    points = policy.measure_frontier(table, prompt_embeddings(policy.backbone, prompts[0]))
    measured = judged(policy, None, frontier=points)
    result = advise(measured, prompts[0])
    found = result["pareto"]
    assert [point["flops_ratio"] for point in found["policy"]] == [point.flops_ratio for point in points]
    assert [point["loss_increase"] for point in found["fixed"]] == pytest.approx(
        np.array(policy.training.loss) - policy.training.loss[0]
    )
    assert found["oracle"] is None and plot_pareto(result, tmp_path / "pareto.png").is_file()
    deeper = [dataclasses.replace(point, loss_increase=None) for point in points]
    assert advise(judged(policy, None, frontier=tuple(deeper)), prompts[0])["pareto"] is None


@pytest.mark.parametrize(
    ("mean", "layer"), [(0.0, 0), (0.5, 0), (0.6, 1), (3.9, 3), (4.0, 3), (4.1, 5), (9, 5)]
)
def test_nearest_candidate(mean, layer):
    assert nearest_candidate(LAYERS, mean) == layer


def judged(policy, advantage, **training):
    return dataclasses.replace(
        policy, training=dataclasses.replace(policy.training, advantage=advantage, **training)
    )


def test_policy_sentence_says_whether_it_was_worth_it(policy):
    assert "was not judged" in policy_sentence(policy, 1.0)
    won = judged(policy, Interval(0.02, 0.01, 0.03))
    assert "On held-out prompts, choosing a layer for each prompt earned more" in policy_sentence(won, 1.0)
    assert "On held-out prompts at skip weight 1, choosing" in policy_sentence(won, 0.5)
    for interval in (Interval(0.02, -0.01, 0.05), Interval(-0.02, -0.03, -0.01), Interval(0.0, 0.0, 0.0)):
        assert "did not beat the best fixed layer" in policy_sentence(judged(policy, interval), 1.0)


def test_verdict_says_where_the_mean_layer_earned_less(policy, prompts):
    torn = judged(policy, Interval(0.02, 0.01, 0.03), loss=(0.1, 9.0, 9.0, 9.0, 0.1), best_fixed=5)
    result = advise(torn, prompts[0])
    assert result["insert_layer"] in (1, 2, 3)
    assert f"insert layer 5 earned {8.9 + (5 - result['insert_layer']) / 8:.4f} more" in result["verdict"]


def recommend(folder, data, out, **options):
    return run(RecommendOptions(out=out, policy=folder, data=data, device="cpu", **options))


def test_command_for_a_data_set(policy_folder, rendered_data, prompts, table, tmp_path, capsys):
    result = recommend(policy_folder, rendered_data, tmp_path)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["prompts"] == {"used": len(prompts[0]), "text_only_left_out": prompts[1]}
    assert prompts[1] > 0
    assert result["chosen_by"] == "reward table"
    assert result["table"]["digest"] == table.digest and result["table"]["trained_on"]
    for name in ("recommend.png", "pareto.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert f"insert layer {result['insert_layer']}" in printed and "trained on another" not in printed
    assert recommend(policy_folder, rendered_data, tmp_path) == result  # a finished run is read, not repeated


def test_command_finds_the_table_that_the_policy_was_trained_with(policy, table, rendered_data, tmp_path):
    """Also where `train-policy --table` was another run's."""
    run, swept = tmp_path / "policy", tmp_path / "sweep" / "table"
    policy.save(run)
    table.save(swept)
    start_run(TrainPolicyOptions(out=run, data=rendered_data, table=swept))
    assert recommend(run, rendered_data, tmp_path / "with")["chosen_by"] == "reward table"
    shutil.rmtree(swept)
    assert recommend(run, rendered_data, tmp_path / "without")["chosen_by"] == "mean of the policy's layers"


def test_command_takes_another_table_and_a_wish(policy_alone, policy_folder, rendered_data, tmp_path, capsys):
    result = recommend(policy_alone, rendered_data, tmp_path / "a", skip_weight=0.2)
    assert result["chosen_by"] == "mean of the policy's layers" and result["asked"] == {"skip_weight": 0.2}
    assert not (tmp_path / "a" / "pareto.png").exists()
    tabled = recommend(policy_alone, rendered_data, tmp_path / "b", table=policy_folder / "table")
    assert tabled["chosen_by"] == "reward table" and tabled["skip_weight"] == 1.0
    assert "skip weight 0.2" in capsys.readouterr().out


def test_a_table_that_the_policy_was_not_trained_on_is_reported(
    policy, policy_folder, rendered_data, tmp_path, capsys
):
    dataclasses.replace(policy, table_digest="00112233aabbccdd").save(tmp_path / "policy")
    result = recommend(tmp_path / "policy", rendered_data, tmp_path / "run", table=policy_folder / "table")
    assert not result["table"]["trained_on"]
    assert "trained on another, 00112233aabbccdd" in capsys.readouterr().out


def test_command_meets_a_budget(policy, policy_folder, table, prompts, rendered_data, tmp_path):
    observations = prompt_embeddings(policy.backbone, prompts[0])
    points = policy.measure_frontier(table, observations)
    ratio = points[6].flops_ratio
    training = dataclasses.replace(policy.training, frontier=points)
    dataclasses.replace(policy, training=training).save(tmp_path / "policy")
    table.save(tmp_path / "policy" / "table")
    result = recommend(tmp_path / "policy", rendered_data, tmp_path / "run", flops_ratio=ratio)
    assert result["asked"] == {"flops_ratio": ratio}
    assert result["policy"]["flops_ratio"] <= ratio + 1e-12
    with pytest.raises(ValueError, match=r"--flops-ratio 0\.01: the least this policy reaches"):
        recommend(tmp_path / "policy", rendered_data, tmp_path / "none", flops_ratio=0.01)
    with pytest.raises(ValueError, match=r"--max-loss-increase: .* not measured"):
        recommend(policy_folder, rendered_data, tmp_path / "none", max_loss_increase=0.02)


def test_command_judges_on_the_prompts_train_policy_held_out(policy, table, prompts, rendered_data, tmp_path):
    policy.save(tmp_path / "policy")
    table.save(tmp_path / "policy" / "table")
    keys = prompt_keys(prompts[0][:30])
    (tmp_path / "policy" / "held_out.json").write_text(json.dumps({"prompt_keys": keys}))
    result = recommend(tmp_path / "policy", rendered_data, tmp_path / "run")
    kept = sum(key in keys for key in table.prompt_keys)
    assert result["policy"]["judged_on"]["prompts"] == kept < len(table)
    (tmp_path / "policy" / "held_out.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"held_out\.json does not list prompts"):
        recommend(tmp_path / "policy", rendered_data, tmp_path / "other")


def test_a_table_of_something_else_is_refused(policy, table, prompts, tmp_path):
    table.save(tmp_path / "table")
    whole = RewardTable.load(tmp_path / "table", LAYERS)
    assert table_of(whole, policy, prompts[0][:5], "--table T").losses.shape == (5, 5)
    strange = dataclasses.replace(policy, backbone_fingerprint="feedfeedfeedfeed")
    with pytest.raises(ValueError, match=r"--table T: .*feedfeedfeedfeed"):
        table_of(whole, strange, prompts[0], "--table T")
    other = [dataclasses.replace(prompts[0][0], answer="never asked"), *prompts[0][1:]]
    with pytest.raises(ValueError, match=r"--table T: 1 of the \d+ prompts are not in its reward table"):
        table_of(whole, policy, other, "--table T")
    deeper = dataclasses.replace(policy, insert_layers=(0, 1, 2, 3, 4))
    whole = RewardTable.load(tmp_path / "table", deeper.insert_layers)
    with pytest.raises(ValueError, match=r"--table T: losses at insert layer 4 are missing"):
        table_of(whole, deeper, prompts[0], "--table T")


def test_command_for_a_prompt(policy_folder, rendered_data, prompts, tmp_path):
    asked = next(prompt for prompt in prompts[0] if len(prompt.messages) == 2)
    image = rendered_data.parent / asked.images[0].path
    options = RecommendOptions(
        out=tmp_path, policy=policy_folder, prompt=asked.question, image=image, skip_weight=0.4, device="cpu"
    )
    result = run(options)
    assert result["per_prompt"][0]["insert_layer"] == result["insert_layer"] in LAYERS
    assert result["skip_weight"] == 0.4 and result["asked"] == {"skip_weight": 0.4}
    assert result["probability"] == result["probabilities"][str(result["insert_layer"])]
    advice = LayerPolicy.load(policy_folder).recommend(asked.question, image, skip_weight=0.4)
    assert result["insert_layer"] == advice.insert_layer and advice.skip_weight == 0.4
    saving = 1 - advice.expected.flops_ratio
    assert result["expected"] == {**dataclasses.asdict(advice.expected), "saving": saving}
    assert "training prompts" in result["note"]
    blind = run(dataclasses.replace(options, image=None, out=tmp_path / "blind"))
    assert "changes nothing" in blind["note"] and blind["expected"]["flops_ratio"] == 1


def test_command_refuses(policy_folder, rendered_data, tmp_path):
    with pytest.raises(ValueError, match="--prompt"):
        run(RecommendOptions(out=tmp_path, policy=policy_folder))
    with pytest.raises(ValueError, match="--prompt"):
        run(RecommendOptions(out=tmp_path, policy=policy_folder, prompt="What?", data=rendered_data))
    with pytest.raises(ValueError, match="has an image"):
        recommend(policy_folder, rendered_data, tmp_path, sources="text")
    with pytest.raises(ValueError, match=r"policy\.json"):
        run(RecommendOptions(out=tmp_path, policy=tmp_path / "nowhere", prompt="What?"))
    with pytest.raises(ValueError, match=r"--skip-weight 1\.5 is outside 0\.1 to 1"):
        recommend(policy_folder, rendered_data, tmp_path, skip_weight=1.5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"skip_weight": 0.5, "flops_ratio": 0.5}, "--skip-weight and --flops-ratio exclude each other"),
        ({"flops_ratio": 0.5, "max_loss_increase": 0.1}, "exclude each other"),
        ({"table": "nowhere"}, "--table .*nowhere: there is no such folder"),
        ({"skip_weight": -1.0}, "--skip-weight -1.0"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(policy_folder, rendered_data, tmp_path, options, said):
    if "table" in options:
        options = {"table": tmp_path / options["table"]}
    with pytest.raises(ValueError, match=said):
        check(RecommendOptions(out=tmp_path, policy=policy_folder, data=rendered_data, **options))
    with pytest.raises(ValueError, match=r"--table .* goes with --data"):
        check(RecommendOptions(out=tmp_path, policy=policy_folder, prompt="What?", table=tmp_path))
