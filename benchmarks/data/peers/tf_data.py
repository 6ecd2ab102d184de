"""tf.data: TFRecords, a sampled box, and the decoder that decodes only that box.

After the ResNet of tensorflow/models (official/vision/ops/preprocess_ops.py and its tf.data guide): the fused
`decode_and_crop_jpeg`, parallel interleave and map, prefetch. Its resize does not antialias.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

from benchmarks.data.peers.common import AREA, MEAN, RATIO, SIZE, STD, arguments, measure

FEATURES = {
    "image/encoded": tf.io.FixedLenFeature([], tf.string),
    "image/class/label": tf.io.FixedLenFeature([], tf.int64),
}


def transform(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    example = tf.io.parse_single_example(record, FEATURES)
    jpeg = example["image/encoded"]
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(jpeg), tf.zeros([0, 0, 4]), min_object_covered=0.1, aspect_ratio_range=RATIO,
        area_range=AREA, max_attempts=10, use_image_if_no_bounding_boxes=True,
    )  # fmt: skip
    window = tf.stack([begin[0], begin[1], size[0], size[1]])
    image = tf.io.decode_and_crop_jpeg(jpeg, window, channels=3)
    image = tf.image.resize(image, [SIZE, SIZE], method="bilinear")
    image = tf.image.random_flip_left_right(image)
    image = (image - 255 * tf.constant(MEAN)) / (255 * tf.constant(STD))
    return image, example["image/class/label"]


def main() -> None:
    args = arguments()
    tf.config.threading.set_inter_op_parallelism_threads(args.threads)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    options = tf.data.Options()
    options.deterministic = False
    options.threading.private_threadpool_size = args.threads
    options.threading.max_intra_op_parallelism = 1
    dataset = (
        tf.data.Dataset.list_files(str(args.prepared / "tfrecord" / "*"))
        .interleave(tf.data.TFRecordDataset, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
        .shuffle(1000)
        .repeat()
        .map(transform, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(args.batch, drop_remainder=True)
        .prefetch(tf.data.AUTOTUNE)
        .with_options(options)
    )
    measure("tf.data", args, dataset, ("tensorflow-cpu", "numpy"))


if __name__ == "__main__":
    main()
