"""Two small trained models, so that every example and test can run offline.

They are ordinary modules, written without a thought for relevance propagation: a sentiment Transformer
(RMSNorm, gated MLP, padding mask) and a Vision Transformer for 8x8 digits (LayerNorm, GELU, class token).
"""

from fxlrp.demo.digits import DigitsViT, load_digits, load_digits_data
from fxlrp.demo.sentiment import Encoding, SentimentTokenizer, SentimentTransformer, load_sentiment

__all__ = [
    "DigitsViT",
    "Encoding",
    "SentimentTokenizer",
    "SentimentTransformer",
    "load_digits",
    "load_digits_data",
    "load_sentiment",
]
