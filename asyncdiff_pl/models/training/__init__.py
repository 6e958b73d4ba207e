"""The modules that train networks of diffusion pipelines, one kind of network a file."""

from asyncdiff_pl.models.training.autoencoder import AutoencoderTraining
from asyncdiff_pl.models.training.base import NetworkTraining
from asyncdiff_pl.models.training.class_denoiser import ClassDenoiserTraining
from asyncdiff_pl.models.training.clip import CLIPTraining
from asyncdiff_pl.models.training.ddpm import DDPM
from asyncdiff_pl.models.training.image_denoiser import ImageDenoiserTraining
from asyncdiff_pl.models.training.video_denoiser import VideoDenoiserTraining

__all__ = [
    "DDPM",
    "AutoencoderTraining",
    "CLIPTraining",
    "ClassDenoiserTraining",
    "ImageDenoiserTraining",
    "NetworkTraining",
    "VideoDenoiserTraining",
]
