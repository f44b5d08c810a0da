"""Prompts through real processors: tokens, images and labels follow the model's own template."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from small_processors import PROCESSORS, TINY, llava, qwen

from deepinsert.envs.data.instructions import load_instructions
from deepinsert.envs.data.media import DatasetError
from deepinsert.envs.prompts import Prompt, answer_loss, encode, prompts_from, text_token_ids

# The text that ends a turn inside a conversation, and the one that ends the last turn.
ENDS = {
    "llava": ("", "</s>"),
    "llava_next": ("", "</s>"),
    "onevision": ("<|im_end|>", "<|im_end|>"),
    "qwen2_5_vl": ("<|im_end|>", "<|im_end|>"),
    "tiny": ("</s>", "</s>"),
}


@pytest.fixture(scope="module", params=PROCESSORS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def processor_of(family: str) -> Any:
    try:
        return PROCESSORS[family]()
    except ModuleNotFoundError as error:
        pytest.skip(
            f"transformers {transformers.__version__}: {error.name}, which {family}'s images need, is missing"
        )


def picture(width: int = 40, height: int = 20, colour: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def dialogue(images: tuple[Image.Image, ...], *turns: tuple[str, str], loss_on: Any = "last") -> Prompt:
    """A conversation whose images all come before the first question."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"][:0] = [{"type": "image"}] * len(images)
    return Prompt("d", "coco", "d", messages, images, turns[-1][1], loss_on)


MIXED = [
    Prompt.from_question("What colour is it?", picture(), "Red and yellow."),
    Prompt.from_question("Is the sky blue?", answer="Yes"),
    dialogue(
        (picture(20, 50, "blue"),),
        ("What is it?", "A cat."),
        ("And\nits colour?", "Black:\n\n- naïve 猫  cat"),
    ),
    dialogue((picture(), picture(30, 30)), ("Same?", "No")),
]


def labelled(family: str, labels: torch.Tensor) -> str:
    return processor_of(family).tokenizer.decode(labels[labels != -100])


# Labels and tokens.


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_exactly_the_last_answer_and_its_end(family: str, side: Any) -> None:
    batch = encode(processor_of(family), MIXED, padding_side=side)
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    for prompt, row in zip(MIXED, batch["labels"], strict=True):
        assert labelled(family, row).lstrip(" ") == prompt.answer + ENDS[family][1]
    mask = batch["labels"] != -100
    assert torch.equal(batch["labels"][mask], batch["input_ids"][mask])
    assert batch["attention_mask"][mask].all()


def test_loss_on_all_labels_every_answer_but_no_question(family: str) -> None:
    turns = [("What is it?", "A cat."), ("Its colour?", "Black"), ("Sure?", "Yes, black.")]
    batch = encode(processor_of(family), [dialogue((picture(),), *turns, loss_on="all")])
    inner, last = ENDS[family]
    expected = "".join(answer + (last if answer == turns[-1][1] else inner) for _, answer in turns)
    assert labelled(family, batch["labels"][0]).replace(" ", "") == expected.replace(" ", "")
    positions = (batch["labels"][0] != -100).nonzero().squeeze(1)
    runs = 1 + int((positions.diff() > 1).sum())
    assert runs == 3


def test_without_answers_a_row_is_the_start_of_the_row_with_answers(family: str) -> None:
    processor = processor_of(family)
    for prompt in MIXED:
        question = encode(processor, [prompt], with_answers=False)
        assert "labels" not in question
        complete = encode(processor, [prompt])
        start = int((complete["labels"][0] != -100).nonzero()[0])
        ids = question["input_ids"][0]
        rendered = processor.apply_chat_template(prompt.messages[:-1], add_generation_prompt=True)
        tail = processor.tokenizer.decode(ids[-3:])
        assert rendered.endswith(tail.lstrip("▁ "))
        if family == "onevision":
            # Its template writes "assistant \n" before answers, but "assistant\n" as generation prompt.
            same = len(ids) - 1
            assert processor.tokenizer.decode(complete["input_ids"][0, same:start]).strip(" ") == "\n"
        else:
            same = len(ids)
            assert start == same
        assert torch.equal(complete["input_ids"][0, :same], ids[:same])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_answers", [True, False])
def test_a_row_in_a_padded_batch_is_the_row_alone(family: str, side: Any, with_answers: bool) -> None:
    processor = processor_of(family)
    batch = encode(processor, MIXED, with_answers=with_answers, padding_side=side)
    for row, prompt in enumerate(MIXED):
        alone = encode(processor, [prompt], with_answers=with_answers)
        assert alone["attention_mask"].all()
        real = batch["attention_mask"][row].bool()
        length = int(real.sum())
        assert real[-length:].all() if side == "left" else real[:length].all()
        assert torch.equal(batch["input_ids"][row, real], alone["input_ids"][0])
        if with_answers:
            assert torch.equal(batch["labels"][row, real], alone["labels"][0])
            assert (batch["labels"][row, ~real] == -100).all()


def test_a_batch_without_any_image_has_no_pixels(family: str) -> None:
    batch = encode(processor_of(family), [MIXED[1], MIXED[1]])
    assert "pixel_values" not in batch
    assert labelled(family, batch["labels"][1]).lstrip() == "Yes" + ENDS[family][1]


def test_images_reach_the_processor_in_order(family: str) -> None:
    processor = processor_of(family)
    shades = [picture(colour=f"rgb({shade},0,0)") for shade in (0, 80, 160, 240)]
    rows = [dialogue((shades[0],), ("Q", "A")), MIXED[1], dialogue(tuple(shades[1:]), ("Q", "A"))]
    batch = encode(processor, rows)
    red = batch["pixel_values"].double()
    if family == "qwen2_5_vl":  # Rows are patches; the grid has their number per image.
        counts = batch["image_grid_thw"].prod(dim=1).tolist()
        means = [part.mean() for part in red.split(counts)]
    elif red.ndim == 5:  # Each image has several tiles; the first is the whole image.
        means = [image[0].mean() for image in red]
    else:
        means = [image.mean() for image in red]
    assert len(means) == 4 and means == sorted(means)


def test_placeholders_match_the_images(family: str) -> None:
    processor = processor_of(family)
    batch = encode(processor, MIXED)
    counts = (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist()
    assert counts[1] == 0 and counts[0] > 0 and counts[3] > counts[2] // 2
    if family in ("llava", "tiny"):
        assert counts[3] == 2 * counts[0]


def test_text_token_ids_are_the_rows_without_placeholders_and_padding(family: str) -> None:
    processor = processor_of(family)
    batch = encode(processor, MIXED, with_answers=False)
    real = batch["attention_mask"].bool() & (batch["input_ids"] != processor.image_token_id)
    rows = [ids[keep].tolist() for ids, keep in zip(batch["input_ids"], real, strict=True)]
    assert text_token_ids(processor, MIXED) == rows


# Text that spells special tokens.


def test_data_can_neither_insert_images_nor_end_turns(family: str) -> None:
    processor = processor_of(family)
    special = "".join(["<image>", processor.image_token, "</s>", "<|im_end|>", "<|im_start|>"])
    prompt = Prompt.from_question(f"What is {special}?", answer=f"It is {special}.")
    assert prompt.images == () and "<image>" in prompt.question
    batch = encode(processor, [prompt])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert processor.image_token_id not in ids
    special_ids = torch.tensor(processor.tokenizer.all_special_ids)
    assert int(torch.isin(labels[labels != -100], special_ids).sum()) == 1  # The answer's end token only.
    assert "It is < image>" in labelled(family, labels)


def test_an_empty_answer_is_its_end_token(family: str) -> None:
    batch = encode(processor_of(family), [Prompt.from_question("What?", picture(), "")])
    assert labelled(family, batch["labels"][0]).strip() == ENDS[family][1]


def test_a_template_that_changes_answers_is_refused() -> None:
    processor = llava()
    processor.chat_template = "{% for m in messages %}{{ m.content[0].text | upper }}|{% endfor %}"
    with pytest.raises(ValueError, match="chat template of LlavaProcessor does not write answer 'Yes'"):
        encode(processor, [MIXED[1]])


def test_a_token_merged_across_the_start_of_an_answer_is_labelled() -> None:
    processor = qwen()
    processor.chat_template = (
        "{% for message in messages %}{{ 'Q: ' if message['role'] == 'user' else ' A: ' }}"
        "{{ message['content'][0]['text'] }}{% endfor %}{% if add_generation_prompt %}{{ ' A: ' }}{% endif %}"
    )
    batch = encode(processor, [Prompt.from_question("Which?", answer="cat")])
    assert processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]) == " cat<|im_end|>"


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        encode(processor_of("llava"), [])


def test_a_tokenizer_without_pad_token_pads_with_eos_and_stays_as_it_was() -> None:
    processor = llava()
    assert processor.tokenizer.pad_token is None
    batch = encode(processor, MIXED)
    assert processor.tokenizer.pad_token is None
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert len(padding) and (padding == processor.tokenizer.eos_token_id).all()
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"set tokenizer\.pad_token"):
        encode(processor, MIXED)


# From records to prompts.


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    for name in ("coco/1.png", "coco/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / name)

    def turn(role: str, value: str) -> dict[str, str]:
        return {"from": role, "value": value}

    talk = [
        turn("human", "Compare <image>\nwith\n<image> please"),
        turn("gpt", "Alike."),
        turn("human", "Why?"),
        turn("gpt", "Both red."),
    ]
    late = [
        turn("human", "Hello"),
        turn("gpt", "Hi"),
        turn("human", "What?\n<image>"),
        turn("gpt", "A cat"),
    ]
    records = [
        {"id": "two", "image": ["coco/1.png", "coco/2.png"], "conversations": talk},
        {"id": "late", "image": "coco/2.png", "conversations": late},
        {"id": "same", "conversations": [turn("human", "SVG <image>?"), turn("gpt", "A tag")]},
        {"id": "same", "image": "coco/1.png", "conversations": [turn("human", "What?"), turn("gpt", "Red")]},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records))
    return path


def test_a_prompt_for_every_turn(data_file: Path) -> None:
    prompts = prompts_from(load_instructions(data_file))
    assert [prompt.id for prompt in prompts] == ["two#1", "two#2", "late#1", "late#2", "same@2", "same@3"]
    assert [prompt.answer for prompt in prompts] == ["Alike.", "Both red.", "Hi", "A cat", "A tag", "Red"]
    assert [len(prompt.load_images()) for prompt in prompts] == [2, 2, 0, 1, 0, 1]
    assert {prompt.loss_on for prompt in prompts} == {"last"}
    assert prompts[0].messages[0]["content"] == [
        {"type": "text", "text": "Compare "},
        {"type": "image"},
        {"type": "text", "text": "with"},
        {"type": "image"},
        {"type": "text", "text": " please"},
    ]
    assert prompts[3].messages[2]["content"] == [{"type": "text", "text": "What?"}, {"type": "image"}]
    assert prompts[3].question == "What?"
    assert prompts[4].messages[0]["content"] == [{"type": "text", "text": "SVG <image>?"}]
    assert prompts[5].messages[0]["content"][0] == {"type": "image"}
    assert [prompt.source for prompt in prompts] == ["coco"] * 4 + ["text", "coco"]
    # A turn before the image has the image's key, too.
    assert prompts[2].image_key == prompts[3].image_key == "coco/2.png"


def test_a_prompt_for_every_record(data_file: Path) -> None:
    prompts = prompts_from(load_instructions(data_file), per="record")
    assert [prompt.id for prompt in prompts] == ["two", "late", "same@2", "same@3"]
    assert [prompt.loss_on for prompt in prompts] == ["all"] * 4
    assert [len(prompt.messages) for prompt in prompts] == [4, 4, 2, 2]
    assert [prompt.answer for prompt in prompts] == ["Both red.", "A cat", "A tag", "Red"]
    with pytest.raises(ValueError, match="'turns'"):
        prompts_from(load_instructions(data_file), per="turns")


def test_records_encode_with_their_images(data_file: Path, family: str) -> None:
    for per in ("turn", "record"):
        prompts = prompts_from(load_instructions(data_file), per=per)
        batch = encode(processor_of(family), prompts)
        for prompt, row in zip(prompts, batch["labels"], strict=True):
            assert labelled(family, row).endswith(prompt.answer + ENDS[family][1])


def test_an_image_that_breaks_after_loading_is_named_with_its_record(data_file: Path) -> None:
    prompts = prompts_from(load_instructions(data_file))
    image = data_file.parent / "coco" / "2.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(DatasetError) as error:
        encode(processor_of("llava"), prompts)
    for part in (str(data_file), "record 0", "'two'", "'image'", "coco/2.png"):
        assert part in str(error.value)


def test_one_off_questions(tmp_path: Path) -> None:
    picture(5, 7).convert("L").save(tmp_path / "grey.png")
    by_path = Prompt.from_question("What?", tmp_path / "grey.png", "A square")
    assert by_path.load_images()[0].size == (5, 7) and by_path.load_images()[0].mode == "RGB"
    by_image = Prompt.from_question("Now <image>\nwhat?", picture().convert("L"))
    assert by_image.load_images()[0].mode == "RGB" and by_image.question == "Now \nwhat?"
    assert Prompt.from_question("Why?").images == ()
    with pytest.raises(ValueError, match="2 <image> marks for one image"):
        Prompt.from_question("<image><image>", picture())
    with pytest.raises(DatasetError, match=r"none\.png"):
        Prompt.from_question("What?", tmp_path / "none.png").load_images()


# The loss.


def test_answer_loss_is_the_mean_over_each_rows_answer() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, 3, 1, -100], [-100, 2, -100, -100, 6]])
    log = logits.log_softmax(-1)
    expected = [-(log[0, 1, 3] + log[0, 2, 1]) / 2, -(log[1, 0, 2] + log[1, 3, 6]) / 2]
    assert torch.allclose(answer_loss(logits, labels), torch.stack(expected), rtol=0, atol=1e-12)


def test_answer_loss_is_float32_and_differentiable_in_half_precision() -> None:
    logits = torch.randn(1, 4, 9, dtype=torch.bfloat16, requires_grad=True)
    loss = answer_loss(logits, torch.tensor([[-100, -100, 5, 2]]))
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert logits.grad is not None and logits.grad[0, 1:3].abs().sum() > 0
    assert logits.grad[0, 0].abs().sum() == 0 and logits.grad[0, 3].abs().sum() == 0


@pytest.mark.parametrize("labels", [[[-100, 1, 2], [-100, -100, -100]], [[-100, 1, 2], [4, -100, -100]]])
def test_answer_loss_refuses_rows_without_answer_tokens(labels: list[list[int]]) -> None:
    # No logits predict the label at position 0.
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        answer_loss(torch.zeros(2, 3, 5), torch.tensor(labels))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_batch_is_that_of_its_rows_alone(side: Any) -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32).eval()
    processor = processor_of("tiny")

    def losses(prompts: list[Prompt]) -> torch.Tensor:
        batch = encode(processor, prompts, padding_side=side)
        labels = batch.pop("labels")
        if side == "left":
            positions = batch["attention_mask"].cumsum(dim=1) - 1
            batch["position_ids"] = positions.clamp_min(0)
        with torch.no_grad():
            return answer_loss(model(**batch).logits, labels)

    together = losses(MIXED)
    alone = torch.cat([losses([prompt]) for prompt in MIXED])
    assert torch.allclose(together, alone, rtol=0, atol=1e-4)
