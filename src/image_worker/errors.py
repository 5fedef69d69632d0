"""Every error this worker raises on purpose, sorted by whose fault it is.

    WorkerError
    ├── CallerError                the job is wrong; the next job is fine
    │   ├── InvalidRequest         a field is missing, misspelt, of the wrong type or out of range
    │   ├── InvalidImage           the bytes are no picture that this worker accepts
    │   ├── ImageUnavailable       the URL could not be fetched (may be retried)
    │   ├── InvalidLora            what is named is no LoRA for this model, or may not be had
    │   └── LoraUnavailable        the LoRA could not be fetched (may be retried)
    ├── OperatorError              the deployment is wrong; raised before the first job is taken
    │   ├── InvalidSettings        an environment variable has a value that is not allowed
    │   ├── ModelUnavailable       files are missing and may not, or cannot, be downloaded
    │   ├── ModelMismatch          a checkpoint or LoRA does not fit the model it was named for
    │   └── DoesNotFit             the card has too little memory for the model as configured
    └── EngineError                the worker failed a job that was right
        ├── OutOfMemory            this job needs more memory than the card has left
        ├── BrokenPicture          the model produced numbers that are no picture (NaN or infinity)
        ├── CardLost               CUDA failed for good; the process is replaced (may be retried)
        ├── ReplyTooLarge          the pictures made are more than one reply may hold
        ├── StorageUnavailable     the pictures made could not be stored (may be retried)
        └── InternalError          anything unforeseen; details are in the log only (may be retried)

Third-party errors are translated once, where they enter; what no one foresaw becomes an
`InternalError` in `worker.py`, the one catch-all.
"""

from __future__ import annotations

from typing import ClassVar, TypedDict


class _ErrorFields(TypedDict):
    type: str
    message: str
    retryable: bool


class ErrorReply(_ErrorFields, total=False):
    """What a caller is told about an error. `field` names the field at fault, if one is."""

    field: str


class WorkerError(Exception):
    """Base of the tree. `message` is shown to the caller: no paths, no host names, no traceback."""

    type: ClassVar[str]
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def reply(self) -> ErrorReply:
        """The error as the JSON object that the caller gets."""
        reply: ErrorReply = {
            "type": self.type,
            "message": self.message,
            "retryable": self.retryable,
        }
        if self.field is not None:
            reply["field"] = self.field
        return reply


class CallerError(WorkerError):
    """The job is wrong."""


class InvalidRequest(CallerError):
    type = "invalid_request"


class InvalidImage(CallerError):
    type = "invalid_image"


class ImageUnavailable(CallerError):
    type = "image_unavailable"
    retryable = True


class InvalidLora(CallerError):
    type = "invalid_lora"


class LoraUnavailable(CallerError):
    type = "lora_unavailable"
    retryable = True


class OperatorError(WorkerError):
    """The deployment is wrong. Ends the process before it takes a job."""


class InvalidSettings(OperatorError):
    type = "invalid_settings"


class ModelUnavailable(OperatorError):
    type = "model_unavailable"


class ModelMismatch(OperatorError):
    type = "model_mismatch"


class DoesNotFit(OperatorError):
    type = "does_not_fit"


class EngineError(WorkerError):
    """The worker failed a job that was right."""


class OutOfMemory(EngineError):
    type = "out_of_memory"


class BrokenPicture(EngineError):
    type = "broken_picture"


class CardLost(EngineError):
    type = "card_lost"
    retryable = True


class ReplyTooLarge(EngineError):
    type = "reply_too_large"


class StorageUnavailable(EngineError):
    type = "storage_unavailable"
    retryable = True


class InternalError(EngineError):
    type = "internal_error"
    retryable = True
