"""Let accelerate, and so transformers' Trainer, take ``"samoyeds"`` where they ask for a dynamo backend: `register`.

    samoyeds_compile.integrations.accelerate.register()
    Trainer(model, TrainingArguments(..., torch_compile_backend="samoyeds"))

accelerate looks the name up in an enumeration of its own, ``DynamoBackend``, and refuses all others. Python offers no
public way to add a member to a finished one, so its tables are extended, as they are laid out since Python 3.4.
"""

from __future__ import annotations

from samoyeds_compile.errors import IntegrationError

NAME = "SAMOYEDS"


def register() -> None:
    """Make ``"samoyeds"`` a backend that accelerate knows, in this process; calling it again changes nothing.

    From then on ``Accelerator(dynamo_backend="samoyeds")``, ``TorchDynamoPlugin(backend="samoyeds")``,
    ``TrainingArguments(torch_compile_backend="samoyeds")`` and ``ACCELERATE_DYNAMO_BACKEND=samoyeds`` work.

    Raises:
        IntegrationError: accelerate is not installed.
    """
    try:
        from accelerate.utils import DynamoBackend
    except ImportError as error:
        raise IntegrationError(f"register: accelerate cannot be imported ({error}); pip install accelerate") from error
    if NAME in DynamoBackend._value2member_map_:
        return
    member = str.__new__(DynamoBackend, NAME)
    member._name_, member._value_ = NAME, NAME
    DynamoBackend._member_names_.append(NAME)
    DynamoBackend._member_map_[NAME] = DynamoBackend._value2member_map_[NAME] = member
