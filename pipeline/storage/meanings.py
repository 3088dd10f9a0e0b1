"""What an S3 error means: whether it passes, and of a permanent one what it tells the user, with the remedy."""

from __future__ import annotations

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from pipeline.base.errors import UserError
from pipeline.storage.ranges import ShortBody
from pipeline.storage.stat import NoAccess

_PASSING_CODES = {
    "SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "ConditionalRequestConflict", "OperationAborted",
}  # fmt: skip
_PASSING_STATUS = {429, 500, 502, 503, 504}
_PASSING_ERRORS = (
    boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ReadTimeoutError, boto.ConnectionClosedError,
    boto.ResponseStreamingError, boto.IncompleteReadError, ResponseParserError, HTTPError, ShortBody,
)  # fmt: skip
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_NOT_RENEWED = (boto.NoCredentialsError, boto.CredentialRetrievalError, boto.MetadataRetrievalError)
_STILL_EXPIRED = "refreshed credentials are still expired"  # what botocore's RuntimeError says
_MISSING = {"NoSuchKey", "404", "NotFound", "NoSuchUpload"}
_IDENTITY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", *_EXPIRED}
_DENIED = {"AccessDenied", "AllAccessDisabled", "403", "Forbidden"}
_ELSEWHERE = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_NO_IDENTITY = (
    boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.ProfileNotFound,
    boto.TokenRetrievalError, boto.SSOError, boto.ConfigParseError, boto.MetadataRetrievalError,
)  # fmt: skip
CHAIN = "a role of the machine, AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class Changed(UserError):
    """The object is not of the version that was asked for."""


def code_of(error: boto.ClientError) -> str:
    """S3's own name of an error."""
    return str(error.response.get("Error", {}).get("Code", ""))


def passes(error: Exception) -> bool:
    """Whether an error comes of a store that is away or busy: the same request may succeed later."""
    if isinstance(error, boto.ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return code_of(error) in _PASSING_CODES or status in _PASSING_STATUS
    return isinstance(error, _PASSING_ERRORS) and not isinstance(error, boto.SSLError)


def of_credentials(error: Exception) -> bool:
    """Whether an error says that credentials have expired, or that whoever renews them does not answer."""
    if isinstance(error, boto.ClientError):
        if error.operation_name.startswith("AssumeRole"):
            return True
        # A HEAD has no body to tell an expired token by.
        return code_of(error) in _EXPIRED or (code_of(error) == "400" and error.operation_name == "HeadObject")
    return isinstance(error, _NOT_RENEWED) or (isinstance(error, RuntimeError) and _STILL_EXPIRED in str(error))


def meaning(url: str, error: Exception) -> Exception:
    """The exception to raise instead: FileNotFoundError, or a UserError such as Changed or NoAccess."""
    if isinstance(error, boto.ClientError):
        return _refused(url, error)
    if isinstance(error, (*_NO_IDENTITY, RuntimeError)):
        return NoAccess(f"'{url}': no credentials for S3 ({_short(error)}): give them by {CHAIN}")
    if isinstance(error, boto.SSLError):
        return UserError(f"'{url}': the store's certificate is not trusted ({_short(error)}): set AWS_CA_BUNDLE")
    return UserError(f"'{url}' cannot be used ({_short(error)}): check the bucket's name and the AWS settings")


def _refused(url: str, error: boto.ClientError) -> Exception:
    code = code_of(error)
    bucket = url.removeprefix("s3://").partition("/")[0]
    if code in _MISSING:
        return FileNotFoundError(f"'{url}' does not exist")
    if code in ("PreconditionFailed", "412"):
        return Changed(f"'{url}' was changed while it was in use: whoever writes it must not, then run again")
    if code == "NoSuchBucket":
        return UserError(
            f"'{url}': there is no bucket '{bucket}' at this endpoint: make it, or check its name and AWS_ENDPOINT_URL"
        )
    if code in _IDENTITY or of_credentials(error):
        return NoAccess(f"'{url}': S3 does not accept the credentials ({code}): renew them ({CHAIN})")
    if code in _DENIED:
        return NoAccess(
            f"'{url}': S3 denies access ({error.operation_name}): allow s3:GetObject, s3:PutObject, s3:DeleteObject, "
            "s3:AbortMultipartUpload, s3:ListBucket and s3:ListBucketMultipartUploads on bucket "
            f"'{bucket}', or use other credentials"
        )
    if code in _ELSEWHERE:
        return UserError(f"'{url}': bucket '{bucket}' is in another region ({code}): set AWS_REGION to it")
    if code == "RequestTimeTooSkewed":
        return UserError(f"'{url}': this machine's clock is wrong ({code}): set it")
    if code == "NotImplemented":
        return UserError(
            f"'{url}': this store cannot do {error.operation_name} as it is needed (conditional writes keep a run to "
            "one writer): use a store that can"
        )
    return UserError(f"'{url}': S3 refuses {error.operation_name} ({_short(error)}): check the bucket and its policy")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
