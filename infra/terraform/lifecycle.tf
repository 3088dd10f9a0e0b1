resource "aws_s3_bucket_lifecycle_configuration" "this" {
  bucket     = aws_s3_bucket.this.id
  depends_on = [aws_s3_bucket_versioning.this]

  rule {
    id     = "old-versions"
    status = "Enabled"

    filter {}

    noncurrent_version_expiration {
      noncurrent_days = var.noncurrent_days
    }

    expiration {
      expired_object_delete_marker = true
    }
  }

  # A run deletes its step checkpoints, each as large as the network, as soon as newer ones are whole, and overwrites its
  # lease all the time: their old versions would soon be most of the bucket.
  rule {
    id     = "step-checkpoints"
    status = "Enabled"

    filter {
      prefix = "${var.runs_prefix}/"
    }

    noncurrent_version_expiration {
      noncurrent_days = var.runs_noncurrent_days
    }
  }

  rule {
    id     = "torn-uploads"
    status = "Enabled"

    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = 2
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "logs" {
  bucket = aws_s3_bucket.logs.id

  rule {
    id     = "old-logs"
    status = "Enabled"

    filter {}

    expiration {
      days = var.access_log_days
    }
  }
}
