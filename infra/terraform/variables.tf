variable "region" {
  description = "AWS region of the bucket and the cluster."
  type        = string
}

variable "bucket" {
  description = "Name of the bucket to make, for shards and runs."
  type        = string
}

variable "name" {
  description = "Prefix of the roles and groups; the cluster_name in infra/aws/cluster.yaml."
  type        = string
  default     = "secateur"
}

variable "shards_prefix" {
  description = "Where shards lie in the bucket: nodes read it and cannot change it."
  type        = string
  default     = "shards"

  validation {
    condition     = can(regex("^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$", var.shards_prefix))
    error_message = "shards_prefix is a path without a slash at either end, and without wildcards."
  }
}

variable "runs_prefix" {
  description = "Where runs lie in the bucket: nodes read, write and delete there."
  type        = string
  default     = "runs"

  validation {
    condition     = can(regex("^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$", var.runs_prefix))
    error_message = "runs_prefix is a path without a slash at either end, and without wildcards."
  }
}

variable "noncurrent_days" {
  description = "Days that overwritten and deleted objects are kept."
  type        = number
  default     = 14
}

variable "runs_noncurrent_days" {
  description = "As noncurrent_days, for what lies under runs_prefix: step checkpoints above all. The shorter one counts."
  type        = number
  default     = 3
}

variable "access_log_days" {
  description = "Days that S3's access logs are kept, in a bucket of their own."
  type        = number
  default     = 90
}

variable "vpc_id" {
  description = "VPC of the cluster."
  type        = string
}

variable "subnet_id" {
  description = "Subnet of the cluster: one, so that gradients do not travel between zones."
  type        = string
}

variable "admin_cidrs" {
  description = "Addresses that may reach the head by SSH, as in [\"203.0.113.7/32\"]; none by default."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for cidr in var.admin_cidrs : can(cidrnetmask(cidr)) && tonumber(split("/", cidr)[1]) >= 8])
    error_message = "admin_cidrs are IPv4 ranges such as 203.0.113.7/32; anything wider than /8 is refused."
  }
}

variable "ami_id" {
  description = "Image of the nodes that `ray up` starts: Ubuntu with Docker and NVIDIA's container toolkit."
  type        = string
}

variable "key_name" {
  description = "EC2 key pair for `ray up`; its private key is expected in ~/.ssh/KEY_NAME.pem."
  type        = string
}

variable "oidc_provider_arn" {
  description = "OIDC provider of an EKS cluster, for the pods' role; empty where there is none."
  type        = string
  default     = ""
}

variable "namespace" {
  description = "Kubernetes namespace of infra/kuberay."
  type        = string
  default     = "secateur"
}
