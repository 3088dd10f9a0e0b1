data "aws_caller_identity" "this" {}
data "aws_partition" "this" {}

locals {
  ec2 = "arn:${data.aws_partition.this.partition}:ec2:${var.region}:${data.aws_caller_identity.this.account_id}"
}

# What every node may do: read shards, keep runs, see nothing else in the bucket.
data "aws_iam_policy_document" "storage" {
  source_policy_documents = [data.aws_iam_policy_document.key.json]

  statement {
    sid       = "ReadShards"
    actions   = ["s3:GetObject"]
    resources = ["${aws_s3_bucket.this.arn}/${var.shards_prefix}/*"]
  }

  statement {
    sid       = "KeepRuns"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = ["${aws_s3_bucket.this.arn}/${var.runs_prefix}/*"]
  }

  statement {
    sid       = "ListBoth"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.this.arn]

    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = ["${var.shards_prefix}/*", "${var.runs_prefix}/*"]
    }
  }

  # To clean up torn uploads; AWS cannot narrow this one to a prefix. It shows names of uploads, not their content.
  statement {
    sid       = "ListUploads"
    actions   = ["s3:ListBucketMultipartUploads"]
    resources = [aws_s3_bucket.this.arn]
  }
}

resource "aws_iam_policy" "storage" {
  name   = "${var.name}-storage"
  policy = data.aws_iam_policy_document.storage.json
}

data "aws_iam_policy_document" "ec2_trust" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "worker" {
  name               = "${var.name}-worker"
  assume_role_policy = data.aws_iam_policy_document.ec2_trust.json
}

resource "aws_iam_role_policy_attachment" "worker_storage" {
  role       = aws_iam_role.worker.name
  policy_arn = aws_iam_policy.storage.arn
}

resource "aws_iam_instance_profile" "worker" {
  name = "${var.name}-worker"
  role = aws_iam_role.worker.name
}

resource "aws_iam_role" "head" {
  name               = "${var.name}-head"
  assume_role_policy = data.aws_iam_policy_document.ec2_trust.json
}

resource "aws_iam_role_policy_attachment" "head_storage" {
  role       = aws_iam_role.head.name
  policy_arn = aws_iam_policy.storage.arn
}

resource "aws_iam_instance_profile" "head" {
  name = "${var.name}-head"
  role = aws_iam_role.head.name
}

# The head also starts and ends workers: instances that carry this cluster's tag, with the workers' role, in its subnet.
data "aws_iam_policy_document" "autoscaler" {
  statement {
    sid = "See"
    actions = [
      "ec2:DescribeImages", "ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeKeyPairs",
      "ec2:DescribeSecurityGroups", "ec2:DescribeSubnets",
    ]
    resources = ["*"]
  }

  statement {
    sid       = "StartTagged"
    actions   = ["ec2:RunInstances"]
    resources = ["${local.ec2}:instance/*"]

    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/ray-cluster-name"
      values   = [var.name]
    }

    condition {
      test     = "ArnEquals"
      variable = "ec2:InstanceProfile"
      values   = [aws_iam_instance_profile.worker.arn]
    }
  }

  statement {
    sid     = "StartWith"
    actions = ["ec2:RunInstances"]
    resources = [
      "${local.ec2}:subnet/${var.subnet_id}",
      "${local.ec2}:security-group/${aws_security_group.ray.id}",
      "${local.ec2}:key-pair/${var.key_name}",
      "${local.ec2}:network-interface/*",
      "${local.ec2}:volume/*",
      "${local.ec2}:spot-instances-request/*",
      "arn:${data.aws_partition.this.partition}:ec2:${var.region}::image/${var.ami_id}",
    ]
  }

  statement {
    sid       = "TagNew"
    actions   = ["ec2:CreateTags"]
    resources = ["${local.ec2}:instance/*", "${local.ec2}:volume/*"]

    condition {
      test     = "StringEquals"
      variable = "ec2:CreateAction"
      values   = ["RunInstances"]
    }
  }

  statement {
    sid       = "ManageTagged"
    actions   = ["ec2:CreateTags", "ec2:TerminateInstances"]
    resources = ["${local.ec2}:instance/*"]

    condition {
      test     = "StringEquals"
      variable = "ec2:ResourceTag/ray-cluster-name"
      values   = [var.name]
    }
  }

  statement {
    sid       = "PassWorkerRole"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.worker.arn]

    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role_policy" "autoscaler" {
  name   = "autoscaler"
  role   = aws_iam_role.head.id
  policy = data.aws_iam_policy_document.autoscaler.json
}

# The pods of infra/kuberay: the two accounts there, in that namespace, and no others.
data "aws_iam_policy_document" "pod_trust" {
  count = var.oidc_provider_arn == "" ? 0 : 1

  statement {
    actions = ["sts:AssumeRoleWithWebIdentity"]

    principals {
      type        = "Federated"
      identifiers = [var.oidc_provider_arn]
    }

    condition {
      test     = "StringEquals"
      variable = "${split("oidc-provider/", var.oidc_provider_arn)[1]}:sub"
      values   = [for who in ["head", "worker"] : "system:serviceaccount:${var.namespace}:secateur-${who}"]
    }

    condition {
      test     = "StringEquals"
      variable = "${split("oidc-provider/", var.oidc_provider_arn)[1]}:aud"
      values   = ["sts.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "pod" {
  count              = var.oidc_provider_arn == "" ? 0 : 1
  name               = "${var.name}-pod"
  assume_role_policy = data.aws_iam_policy_document.pod_trust[0].json
}

resource "aws_iam_role_policy_attachment" "pod_storage" {
  count      = var.oidc_provider_arn == "" ? 0 : 1
  role       = aws_iam_role.pod[0].name
  policy_arn = aws_iam_policy.storage.arn
}
