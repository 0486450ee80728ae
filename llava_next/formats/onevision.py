"""The stock processor of LLaVA-OneVision for images, which transformers ties to one for videos.

The stock class cannot be constructed without a video processor, and that needs torchvision. The class here leaves it
out; it is written so that the stock class loads it where torchvision is installed.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, LlavaOnevisionProcessor, ProcessorMixin
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

ONEVISION_SERVING = (
    "transformers: the processor needs torchvision, and takes the images of one sample as a list in a list. vLLM cuts "
    "each of several images with AnyRes, where training padded each to one view"
)
"""What differs from the training where an export is used."""


class ImagesOnlyProcessor(LlavaOnevisionProcessor):  # type: ignore[misc]
    """LLaVA-OneVision's processor without videos. Prompts, views and counts of images are those of the stock class.

    A list of images is cut with AnyRes, each image by itself; a list of lists has the images of one sample in each
    list, as the stock class defines it.
    """

    def __init__(
        self,
        image_processor: LlavaOnevisionImageProcessorPil,
        tokenizer: Any,
        num_image_tokens: int,
        vision_feature_select_strategy: str,
        chat_template: str | None = None,
        vision_aspect_ratio: str = "anyres_max_9",
        image_token: str = "<image>",
        video_token: str = "<video>",
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.vision_aspect_ratio = vision_aspect_ratio
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = None
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def onevision_processor(pixels: dict[str, Any], **options: Any) -> ImagesOnlyProcessor:
    """Builds the processor.

    Args:
        pixels: options of the image processor.
        options: of the processor.
    """
    return ImagesOnlyProcessor(LlavaOnevisionImageProcessorPil(**pixels), **options)


def save_onevision_processor(processor: ImagesOnlyProcessor, folder: Path) -> None:
    """Writes the processor in the format of `AutoProcessor`, with a video processor of the same pixels."""
    processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    images = processor.image_processor
    saved |= {
        "processor_class": "LlavaOnevisionProcessor",
        "video_processor": {
            "video_processor_type": "LlavaOnevisionVideoProcessor",
            "size": saved["image_processor"]["size"],
            "image_mean": list(images.image_mean),
            "image_std": list(images.image_std),
        },
    }
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_processor(folder: Path) -> Any:
    """Loads the stock processor of a directory; that of a LLaVA-OneVision without videos."""
    if AutoConfig.from_pretrained(folder).model_type == "llava_onevision":
        return ImagesOnlyProcessor.from_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)
