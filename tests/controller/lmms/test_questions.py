"""Questions and settings of an lmms-eval task become prompts and arguments of `generate`."""

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from deepinsert.controller.lmms.plugin import manifest
from deepinsert.controller.lmms.questions import (
    DEFAULT_NEW_TOKENS,
    GenerationSettings,
    chat_prompt,
    simple_prompt,
)

RED, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))


def test_answers_are_greedy_unless_the_temperature_is_above_0() -> None:
    greedy = {"num_beams": 1, "do_sample": False, "max_new_tokens": DEFAULT_NEW_TOKENS}
    assert GenerationSettings.from_task({}).arguments == greedy
    assert (
        GenerationSettings.from_task(
            {"temperature": 0, "top_p": None, "do_sample": True, "top_k": 5}
        ).arguments
        == greedy
    )
    assert GenerationSettings.from_task({"temperature": 0.7, "do_sample": False}).arguments == greedy
    sampled = GenerationSettings.from_task(
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_new_tokens": 16.0}
    )
    assert sampled.arguments == {
        "num_beams": 1,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "max_new_tokens": 16,
    }


def test_an_answer_ends_before_the_first_stop_string() -> None:
    settings = GenerationSettings.from_task(
        {"until": ["\n\n", "ASSISTANT", ""], "image_aspect_ratio": "original"}
    )
    assert settings.until == ("ASSISTANT",) and settings.ignored == ("image_aspect_ratio",)
    assert settings.truncate(" red ASSISTANT: blue\n\ngreen") == "red"
    assert (
        settings.truncate("\n\nStep 1\n\nStep 2") == "Step 1\n\nStep 2"
        and settings.truncate(" red ") == "red"
    )
    assert GenerationSettings.from_task({"until": "\n"}).truncate("red\nblue") == "red"
    assert GenerationSettings.from_task({"until": "."}).truncate("red. blue") == "red"
    with pytest.raises(ValueError, match=r"until \[3\]"):
        GenerationSettings.from_task({"until": [3]})


def test_images_are_at_the_marks_of_a_text_or_before_it() -> None:
    def parts(text: str, *images: Image.Image) -> list[str]:
        prompt = simple_prompt("task/1", text, images)
        assert [image.getpixel((0, 0)) for image in prompt.load_images()] == [
            image.getpixel((0, 0)) for image in images
        ]
        return [part.get("text", "<>") for part in prompt.messages[0]["content"]]

    assert parts("Which?") == ["Which?"]
    assert parts("Which is red?", RED, BLUE) == ["<>", "<>", "Which is red?"]
    assert parts("Is <image>\nlike <image>?", RED, BLUE) == ["Is ", "<>", "like ", "<>", "?"]
    assert parts("What does <image> mean?", RED, BLUE) == ["<>", "<>", "What does <image> mean?"]


def test_chat_messages_keep_their_turns_and_places() -> None:
    prompt = chat_prompt(
        "task/2",
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image", "url": RED}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
            {
                "role": "user",
                "content": [{"type": "image", "url": BLUE}, {"type": "text", "text": "Colour?"}],
            },
        ],
    )
    assert [message["role"] for message in prompt.messages] == [
        *("system", "user", "assistant", "user", "assistant")
    ]
    assert [part["type"] for part in prompt.messages[1]["content"]] == ["text", "image"]
    assert [image.getpixel((0, 0)) for image in prompt.load_images()] == [(255, 0, 0), (0, 0, 255)]
    assert prompt.question == "Colour?" and prompt.answer == ""


def test_an_image_may_be_a_local_file(tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    (image,) = simple_prompt("task/1", "Colour?", [str(tmp_path / "red.png")]).load_images()
    assert image.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("kind", "medium", "message"),
    [
        ("video", "clip.mp4", r"task/9 asks about video \(str\)"),
        ("audio", {"array": [0.0]}, r"task/9 asks about audio \(dict\)"),
        ("image", "clip.mp4", r"task/9 asks about video"),
    ],
)
def test_other_media_are_refused(kind: str, medium: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_prompt("task/9", [{"role": "user", "content": [{"type": kind, "url": medium}]}])


def test_a_conversation_must_end_in_a_question() -> None:
    with pytest.raises(ValueError, match="must end in a question"):
        chat_prompt("task/9", [{"role": "assistant", "content": "Yes."}])


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_lmms_eval_the_error_names_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"lmms-eval 0\.7 or later is needed: pip install lmms-eval"):
        manifest()
