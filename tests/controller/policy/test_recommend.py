"""The command `recommend`: for a data set, for a prompt, with another table, and what it refuses."""

import dataclasses
import json
import shutil

import pytest

from deepinsert.controller.option_checks import check
from deepinsert.controller.options import RecommendOptions, TrainPolicyOptions
from deepinsert.controller.policy.layer_policy import LayerPolicy
from deepinsert.controller.policy.recommend import run, table_of
from deepinsert.controller.prompt_selection import image_prompts
from deepinsert.controller.runs.folder import start_run
from deepinsert.envs.observations import prompt_embeddings
from deepinsert.envs.rewards.keys import prompt_keys
from deepinsert.envs.rewards.table import RewardTable

LAYERS = (0, 1, 2, 3, 5)


@pytest.fixture(scope="module")
def policy_folder(source_policy, source_table, tmp_path_factory):
    """A run folder as train-policy leaves it."""
    folder = tmp_path_factory.mktemp("policy")
    source_policy.save(folder)
    source_table.save(folder / "table")
    return folder


@pytest.fixture(scope="module")
def policy_alone(source_policy, tmp_path_factory):
    """A policy without the table it was trained on."""
    folder = tmp_path_factory.mktemp("alone")
    source_policy.save(folder)
    return folder


def recommend(folder, data, out, **options):
    return run(RecommendOptions(out=out, policy=folder, data=data, device="cpu", **options))


def test_command_for_a_data_set(
    policy_folder, rendered_data, rendered_prompts, source_table, tmp_path, capsys
):
    text_only = image_prompts(RecommendOptions(out=tmp_path, policy=tmp_path, data=rendered_data))[1]
    result = recommend(policy_folder, rendered_data, tmp_path)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["prompts"] == {"used": len(rendered_prompts), "text_only_left_out": text_only}
    assert text_only > 0
    assert result["chosen_by"] == "reward table"
    assert result["table"]["digest"] == source_table.digest and result["table"]["trained_on"]
    for name in ("recommend.png", "pareto.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert f"insert layer {result['insert_layer']}" in printed and "trained on another" not in printed
    assert recommend(policy_folder, rendered_data, tmp_path) == result  # a finished run is read, not repeated


def test_command_finds_the_table_that_the_policy_was_trained_with(
    source_policy, source_table, rendered_data, tmp_path
):
    """Also where `train-policy --table` was another run's."""
    run, swept = tmp_path / "policy", tmp_path / "sweep" / "table"
    source_policy.save(run)
    source_table.save(swept)
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
    source_policy, policy_folder, rendered_data, tmp_path, capsys
):
    dataclasses.replace(source_policy, table_digest="00112233aabbccdd").save(tmp_path / "policy")
    result = recommend(tmp_path / "policy", rendered_data, tmp_path / "run", table=policy_folder / "table")
    assert not result["table"]["trained_on"]
    assert "trained on another, 00112233aabbccdd" in capsys.readouterr().out


def test_command_meets_a_budget(
    source_policy, policy_folder, source_table, rendered_prompts, rendered_data, tmp_path
):
    observations = prompt_embeddings(source_policy.backbone, rendered_prompts)
    points = source_policy.measure_frontier(source_table, observations)
    ratio = points[6].flops_ratio
    training = dataclasses.replace(source_policy.training, frontier=points)
    dataclasses.replace(source_policy, training=training).save(tmp_path / "policy")
    source_table.save(tmp_path / "policy" / "table")
    result = recommend(tmp_path / "policy", rendered_data, tmp_path / "run", flops_ratio=ratio)
    assert result["asked"] == {"flops_ratio": ratio}
    assert result["policy"]["flops_ratio"] <= ratio + 1e-12
    with pytest.raises(ValueError, match=r"--flops-ratio 0\.01: the least this policy reaches"):
        recommend(tmp_path / "policy", rendered_data, tmp_path / "none", flops_ratio=0.01)
    with pytest.raises(ValueError, match=r"--max-loss-increase: .* not measured"):
        recommend(policy_folder, rendered_data, tmp_path / "none", max_loss_increase=0.02)


def test_command_compares_on_the_prompts_that_train_policy_held_out(
    source_policy, source_table, rendered_prompts, rendered_data, tmp_path
):
    source_policy.save(tmp_path / "policy")
    source_table.save(tmp_path / "policy" / "table")
    keys = prompt_keys(rendered_prompts[:30])
    (tmp_path / "policy" / "held_out.json").write_text(json.dumps({"prompt_keys": keys}))
    result = recommend(tmp_path / "policy", rendered_data, tmp_path / "run")
    held_out = sum(key in keys for key in source_table.prompt_keys)
    assert result["policy"]["judged_on"]["prompts"] == held_out < len(source_table)
    (tmp_path / "policy" / "held_out.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"held_out\.json does not list prompts"):
        recommend(tmp_path / "policy", rendered_data, tmp_path / "other")


def test_a_table_of_something_else_is_refused(source_policy, source_table, rendered_prompts, tmp_path):
    source_table.save(tmp_path / "table")
    whole = RewardTable.load(tmp_path / "table", LAYERS)
    assert table_of(whole, source_policy, rendered_prompts[:5], "--table T").losses.shape == (5, 5)
    foreign = dataclasses.replace(source_policy, backbone_fingerprint="feedfeedfeedfeed")
    with pytest.raises(ValueError, match=r"--table T: .*feedfeedfeedfeed"):
        table_of(whole, foreign, rendered_prompts, "--table T")
    other = [dataclasses.replace(rendered_prompts[0], answer="never asked"), *rendered_prompts[1:]]
    with pytest.raises(ValueError, match=r"--table T: 1 of the \d+ prompts are not in its reward table"):
        table_of(whole, source_policy, other, "--table T")
    deeper = dataclasses.replace(source_policy, insert_layers=(0, 1, 2, 3, 4))
    whole = RewardTable.load(tmp_path / "table", deeper.insert_layers)
    with pytest.raises(ValueError, match=r"--table T: losses at insert layer 4 are missing"):
        table_of(whole, deeper, rendered_prompts, "--table T")


def test_command_for_a_prompt(policy_folder, rendered_data, rendered_prompts, tmp_path):
    prompt = next(item for item in rendered_prompts if len(item.messages) == 2)
    image = rendered_data.parent / prompt.images[0].path
    options = RecommendOptions(
        out=tmp_path, policy=policy_folder, prompt=prompt.question, image=image, skip_weight=0.4, device="cpu"
    )
    result = run(options)
    assert result["per_prompt"][0]["insert_layer"] == result["insert_layer"] in LAYERS
    assert result["skip_weight"] == 0.4 and result["asked"] == {"skip_weight": 0.4}
    assert result["probability"] == result["probabilities"][str(result["insert_layer"])]
    advice = LayerPolicy.load(policy_folder).recommend(prompt.question, image, skip_weight=0.4)
    assert result["insert_layer"] == advice.insert_layer and advice.skip_weight == 0.4
    saving = 1 - advice.expected.flops_ratio
    assert result["expected"] == {**dataclasses.asdict(advice.expected), "saving": saving}
    assert "training prompts" in result["note"]
    without_image = run(dataclasses.replace(options, image=None, out=tmp_path / "blind"))
    assert "changes nothing" in without_image["note"] and without_image["expected"]["flops_ratio"] == 1


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
    ("options", "message"),
    [
        ({"skip_weight": 0.5, "flops_ratio": 0.5}, "--skip-weight and --flops-ratio exclude each other"),
        ({"flops_ratio": 0.5, "max_loss_increase": 0.1}, "exclude each other"),
        ({"table": "nowhere"}, "--table .*nowhere: there is no such folder"),
        ({"skip_weight": -1.0}, "--skip-weight -1.0"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(
    policy_folder, rendered_data, tmp_path, options, message
):
    if "table" in options:
        options = {"table": tmp_path / options["table"]}
    with pytest.raises(ValueError, match=message):
        check(RecommendOptions(out=tmp_path, policy=policy_folder, data=rendered_data, **options))
    with pytest.raises(ValueError, match=r"--table .* goes with --data"):
        check(RecommendOptions(out=tmp_path, policy=policy_folder, prompt="What?", table=tmp_path))
