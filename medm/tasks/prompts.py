"""Instruction templates, written for medm.

Evaluation always uses the first of each pool; training draws from all.
"""

from __future__ import annotations

VQA = (
    "{question}\nAnswer the question about the image in a word or a short phrase.",
    "{question}",
    "Look at the image and answer briefly: {question}",
    "{question} Reply with a short answer only.",
)
VOLUME_VQA = (
    "{question}",
    "Look through the scan and answer: {question}",
    "{question} Answer from what the volume shows.",
)
CHOICE = (
    "{question}\n{options}\nAnswer with the letter of the right choice.",
    "{question}\nChoices:\n{options}\nWhich one is right?",
)
REFER = (
    "Where in the image is the {name}? Answer with its box.",
    "Give the bounding box of the {name}.",
    "Locate the {name} and write down its box.",
    "Mark the {name} with a box.",
    "Which region of the image holds the {name}?",
)
IDENTIFY = (
    "What lies inside the box {box} of the image? Name it.",
    "Name the structure at {box}.",
    "Which object does the region {box} show?",
    "Say what can be seen at {box}.",
)
CHEST_REPORT = (
    "Write the findings of this chest X-ray examination as a radiology report.",
    "Report this chest radiograph.",
    "What does the chest X-ray show? Write a full description of the findings.",
    "Describe heart, lungs, pleura and bones in this chest X-ray.",
)
CAPTION = (
    "Describe what this medical image shows.",
    "Write a caption for this image.",
    "Summarise the findings of this image for a colleague.",
    "What can be seen in this image? Describe it.",
)
VOLUME_REPORT = (
    "Write a radiology report of this scan.",
    "Describe the findings of this volume.",
    "Report what this three-dimensional scan shows.",
    "Summarise the abnormal and normal findings of this scan.",
)
CLASSIFY = (
    "{question} Choose one of: {classes}.",
    "{question} The possible answers are: {classes}.",
)
VOLUME_REFER = (
    "Where in the volume is the {name}? Answer with its box.",
    "Give the three-dimensional box of the {name}.",
    "Locate the {name} in this scan and write down its box.",
)
VOLUME_IDENTIFY = (
    "What lies inside the box {box} of the volume? Name it.",
    "Name the structure at {box} in this scan.",
)
SEGMENT = (
    "Segment the {name} in this scan.",
    "Draw the mask of the {name}.",
    "Where is the {name}? Answer with a mask.",
)
SEGMENT_IMAGE = (
    "Segment the {phrase}.",
    "Draw the mask of the {phrase} in this image.",
    "Where is the {phrase}? Answer with a mask.",
    "Outline every pixel of the {phrase}.",
    "Find the {phrase} and return its mask.",
)
GROUNDED_DIAGNOSIS = (
    "Is there anything abnormal in this image? Segment it and name it.",
    "Name the disease that this image shows, and give its mask.",
    "Which abnormality do you find? Answer with a mask and a diagnosis.",
    "Look for a lesion in this image, outline it, and say what it is.",
)
REGION = (
    "What does the image show in <region>?",
    "Name the structure in <region>.",
    "What is <region> of this image?",
    "Say what lies in <region>, where in the body, and in which kind of image.",
)
GROUNDED_REPORT = (
    "Report the findings of this image, and give a mask of what you find.",
    "Write a short report with masks of the findings.",
    "Describe what is abnormal in this image and segment it.",
    "Which findings does this image show? Report them with their mask.",
)
GROUNDED_VQA = (
    "What is abnormal in the {anatomy}? Answer with a mask of it.",
    "Look at the {anatomy}: name the abnormality and segment it.",
    "Does the {anatomy} show a finding? Name it and give its mask.",
    "Which finding do you see in the {anatomy}? Outline it, too.",
)
SEGMENT_FINDING = (
    "Segment this finding in the scan: {finding}",
    "Give the mask of the finding: {finding}",
    "Where in this scan is the following? Answer with a mask. {finding}",
)
CONTEXT_QA = (
    "Abstract:\n{context}\n\nQuestion: {question}\nAnswer with yes, no or maybe.",
    "Read the abstract and answer with yes, no or maybe.\n{context}\n\n{question}",
)


def lettered(options: dict[str, str]) -> str:
    """Options, one per line, "A. liver"."""
    return "\n".join(f"{letter}. {wording}" for letter, wording in options.items())
