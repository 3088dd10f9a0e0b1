# .terraform.lock.hcl is not kept here: `terraform init` writes one for your machines' platforms; keep it with your state.
terraform {
  required_version = ">= 1.5"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "5.100.0"
    }
  }
}

# Credentials come from the usual AWS chain, never from a variable.
provider "aws" {
  region = var.region

  default_tags {
    tags = { project = "secateur" }
  }
}
