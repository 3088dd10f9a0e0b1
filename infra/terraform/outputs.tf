output "runs_dir" {
  description = "The runs_dir of a run on this bucket."
  value       = "s3://${aws_s3_bucket.this.id}/${var.runs_prefix}"
}

output "shards_root" {
  description = "Where shards go; data.root is a folder below it."
  value       = "s3://${aws_s3_bucket.this.id}/${var.shards_prefix}"
}

output "pod_role_arn" {
  description = "For the annotations in infra/kuberay/serviceaccounts.yaml; null without an OIDC provider."
  value       = one(aws_iam_role.pod[*].arn)
}

output "ray_up_sed" {
  description = "Fills in infra/aws/cluster.yaml: sed -f."
  value       = <<-EOT
    s|^cluster_name: secateur$|cluster_name: ${var.name}|
    s|<AWS_REGION>|${var.region}|
    s|<KEY_NAME>|${var.key_name}|
    s|<AMI_ID>|${var.ami_id}|
    s|<SUBNET_ID>|${var.subnet_id}|
    s|<RAY_SECURITY_GROUP_ID>|${aws_security_group.ray.id}|
    s|<HEAD_SECURITY_GROUP_ID>|${aws_security_group.head.id}|
    s|<HEAD_PROFILE_ARN>|${aws_iam_instance_profile.head.arn}|
    s|<WORKER_PROFILE_ARN>|${aws_iam_instance_profile.worker.arn}|
  EOT
}
