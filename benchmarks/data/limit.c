/* The limit of a CPU input path: what libjpeg-turbo and a lean resize alone reach, with nothing around them.
 *
 *   limit bench LIST WORK OUTPUT THREADS BATCH WARMUP IMAGES   time IMAGES images (after WARMUP) from the JPEGs in LIST
 *   limit one FILE WORK OUTPUT X Y WIDTH HEIGHT FLIP OUT       write one image's pixels, to compare with Pillow's
 *
 * WORK:   full        decode the whole image
 *         region      decode the rows and (to a whole MCU) the columns of the crop box, and no row below it
 *         bilinear    region, then two taps in each direction: torchvision's bilinear with antialias=False
 *         antialias   region, then Pillow's BILINEAR: a triangle as wide as the scale (torchvision's antialias=True)
 * OUTPUT: uint8, or float32 normalised with ImageNet's mean and deviation; 224 x 224 x 3, channels last.
 *
 * The JPEGs lie in memory. Crop boxes follow torchvision's RandomResizedCrop (area 0.08-1, ratio 3/4-4/3, ten tries),
 * flips are coin tosses. A decoded row is resized horizontally at once (from RGBX pixels, two taps a multiply-add),
 * kept in a ring of rows that stays in the first-level cache, and summed vertically as soon as an output row has all
 * it needs; flipping is the order of the horizontal table, normalising the last multiply-add. So pixels never
 * leave the cache before they are final. Decoding is as Pillow's: accurate integer DCT, fancy upsampling.
 *
 * Needs x86-64 with AVX2, and libjpeg-turbo. Compile: gcc -O3 -march=native limit.c -ljpeg -lm -lpthread
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "limit_resize.h"

#include <jpeglib.h>

enum { OFF = 16 }; /* libjpeg-turbo's colour conversion writes past the caches into rows aligned to 32 bytes */
enum { DECODED_ROWS = 16, BATCHES = 4, TRIES = 10 };

static const char *const WORKS[] = {"full", "region", "bilinear", "antialias"};

typedef struct {
    unsigned char *bytes;
    size_t size;
} jpeg_t;

typedef struct {
    int x, y, width, height;
    bool flip;
} box_t;

typedef struct {
    struct jpeg_decompress_struct decoder;
    struct jpeg_error_mgr errors;
    table_t columns, rows;
    unsigned char *decoded; /* DECODED_ROWS rows of RGBX, never at a multiple of 32 bytes */
    size_t decoded_capacity;
    int16_t *ring; /* horizontally resized rows, ROW values each (and PAD) */
    int ring_capacity;
} worker_t;

static void *aligned(size_t size) {
    void *p = NULL;
    if (posix_memalign(&p, 64, size)) {
        perror("limit");
        exit(1);
    }
    return p;
}

/* ---- one image ---- */

static worker_t *new_worker(void) {
    worker_t *w = aligned(sizeof *w);
    memset(w, 0, sizeof *w);
    w->decoder.err = jpeg_std_error(&w->errors);
    jpeg_create_decompress(&w->decoder);
    return w;
}

static void free_worker(worker_t *w) {
    jpeg_destroy_decompress(&w->decoder);
    free(w->columns.weights);
    free(w->rows.weights);
    free(w->decoded);
    free(w->ring);
    free(w);
}

static size_t decoded_stride(int width) { return (4 * ((size_t)width + PAD) + 31) & ~(size_t)31; }

/* Rows that vertical sums may still need, and room for the rows that come with them. */
static void reserve(worker_t *w, int width) {
    size_t row = decoded_stride(width);
    if (row * DECODED_ROWS > w->decoded_capacity) {
        free(w->decoded);
        w->decoded_capacity = row * DECODED_ROWS;
        w->decoded = aligned(OFF + w->decoded_capacity);
        memset(w->decoded, 0, OFF + w->decoded_capacity);
    }
    int needed = 1;
    while (needed < w->rows.taps + 1) needed *= 2;
    if (needed > w->ring_capacity) {
        free(w->ring);
        w->ring_capacity = needed;
        w->ring = aligned((size_t)needed * (ROW + PAD) * sizeof(int16_t));
    }
}

/* Decode `box` of a JPEG, resize it as `work` says, and write it to `out`: uint8 or float32 [SIZE, SIZE, 3]. */
static void process(worker_t *w, const jpeg_t *jpeg, enum work work, bool floats, box_t box, void *out) {
    struct jpeg_decompress_struct *d = &w->decoder;
    jpeg_mem_src(d, jpeg->bytes, jpeg->size);
    jpeg_read_header(d, TRUE);
    d->out_color_space = JCS_EXT_RGBX;
    d->dct_method = JDCT_ISLOW;
    jpeg_start_decompress(d);

    JDIMENSION left = 0, width = d->output_width;
    int end = (int)d->output_height;
    if (work != FULL) {
        left = (JDIMENSION)box.x, width = (JDIMENSION)box.width;
        jpeg_crop_scanline(d, &left, &width);
        if (box.y) jpeg_skip_scanlines(d, (JDIMENSION)box.y);
        end = box.y + box.height;
    }
    if (work == BILINEAR || work == ANTIALIAS) {
        make_table(&w->columns, work, box.width, box.flip, HORIZONTAL_BITS);
        make_table(&w->rows, work, box.height, false, 15);
    }
    reserve(w, (int)d->output_width);

    size_t stride = decoded_stride((int)d->output_width);
    JSAMPROW lines[DECODED_ROWS];
    for (int i = 0; i < DECODED_ROWS; i++) lines[i] = w->decoded + OFF + (size_t)i * stride;
    const int mask = w->ring_capacity - 1, inset = box.x - (int)left, taps = w->rows.taps;
    int finished = 0; /* output rows */
    while ((int)d->output_scanline < end) {
        int row = (int)d->output_scanline, wanted = end - row < DECODED_ROWS ? end - row : DECODED_ROWS;
        int got = (int)jpeg_read_scanlines(d, lines, (JDIMENSION)wanted);
        if (work == FULL || work == REGION) continue;
        for (int i = 0; i < got; i++) {
            int at = row + i - box.y; /* row of the box */
            if (finished < SIZE && at < w->rows.first[finished]) continue; /* two taps pass rows over */
            resize_row(lines[i] + 4 * (size_t)inset, &w->columns, w->ring + (size_t)(at & mask) * (ROW + PAD));
            for (; finished < SIZE && at >= w->rows.first[finished] + w->rows.count[finished] - 1; finished++) {
                int count = w->rows.count[finished];
                const int16_t *rows[count], *weights = w->rows.weights + (size_t)finished * taps;
                for (int j = 0; j < count; j++)
                    rows[j] = w->ring + (size_t)((w->rows.first[finished] + j) & mask) * (ROW + PAD);
                if (floats)
                    finish_float(rows, weights, count, (float *)out + (size_t)finished * ROW);
                else
                    finish_bytes(rows, weights, count, (unsigned char *)out + (size_t)finished * ROW);
            }
        }
    }
    jpeg_abort_decompress(d);
}

/* ---- random boxes ---- */

static uint64_t next_random(uint64_t *state) { /* splitmix64 */
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static double uniform(uint64_t *state) { return (double)(next_random(state) >> 11) * 0x1p-53; }

static box_t random_box(int width, int height, uint64_t *state) {
    box_t box = {.flip = uniform(state) < 0.5};
    for (int i = 0; i < TRIES; i++) {
        double area = (double)width * height * (0.08 + 0.92 * uniform(state));
        double ratio = exp(log(3.0 / 4) + (log(4.0 / 3) - log(3.0 / 4)) * uniform(state));
        int w = (int)lrint(sqrt(area * ratio)), h = (int)lrint(sqrt(area / ratio));
        if (w > 0 && w <= width && h > 0 && h <= height) {
            box.x = (int)(uniform(state) * (width - w + 1)), box.y = (int)(uniform(state) * (height - h + 1));
            box.width = w, box.height = h;
            return box;
        }
    }
    double ratio = (double)width / height;
    box.width = ratio > 4.0 / 3 ? (int)lrint(height * 4.0 / 3) : width;
    box.height = ratio < 3.0 / 4 ? (int)lrint(width * 4.0 / 3) : height;
    box.x = (width - box.width) / 2, box.y = (height - box.height) / 2;
    return box;
}

/* ---- the benchmark ---- */

static struct {
    jpeg_t *jpegs;
    int (*sizes)[2]; /* width, height */
    int *order;
    int num_jpegs, batch, images;
    enum work work;
    bool floats;
    unsigned char *batches[BATCHES];
    atomic_int next;
} job;

static void *run(void *argument) {
    (void)argument;
    worker_t *w = new_worker();
    size_t image_bytes = (size_t)SIZE * ROW * (job.floats ? sizeof(float) : 1);
    for (int n; (n = atomic_fetch_add(&job.next, 1)) < job.images;) {
        int id = job.order[n % job.num_jpegs];
        uint64_t state = (uint64_t)n * 0x2545f4914f6cdd1du + 1;
        box_t box = random_box(job.sizes[id][0], job.sizes[id][1], &state);
        unsigned char *out = job.batches[n / job.batch % BATCHES] + (size_t)(n % job.batch) * image_bytes;
        process(w, &job.jpegs[id], job.work, job.floats, box, out);
    }
    free_worker(w);
    return NULL;
}

static double timed(int images, int threads) {
    struct timespec began, ended;
    pthread_t ids[threads];
    job.images = images;
    atomic_store(&job.next, 0);
    clock_gettime(CLOCK_MONOTONIC, &began);
    for (int i = 0; i < threads; i++) pthread_create(&ids[i], NULL, run, NULL);
    for (int i = 0; i < threads; i++) pthread_join(ids[i], NULL);
    clock_gettime(CLOCK_MONOTONIC, &ended);
    return (double)(ended.tv_sec - began.tv_sec) + (double)(ended.tv_nsec - began.tv_nsec) * 1e-9;
}

static jpeg_t read_jpeg(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        exit(1);
    }
    fseek(file, 0, SEEK_END);
    jpeg_t jpeg = {.size = (size_t)ftell(file)};
    rewind(file);
    jpeg.bytes = xrealloc(NULL, jpeg.size);
    if (fread(jpeg.bytes, 1, jpeg.size, file) != jpeg.size) {
        perror(path);
        exit(1);
    }
    fclose(file);
    return jpeg;
}

static void read_list(const char *path) {
    FILE *file = fopen(path, "r");
    if (!file) {
        perror(path);
        exit(1);
    }
    worker_t *w = new_worker();
    char *line = NULL;
    size_t room = 0;
    ssize_t length;
    while ((length = getline(&line, &room, file)) > 0) {
        line[strcspn(line, "\n")] = 0;
        int n = job.num_jpegs++;
        job.jpegs = xrealloc(job.jpegs, sizeof(jpeg_t) * (size_t)job.num_jpegs);
        job.sizes = xrealloc(job.sizes, sizeof *job.sizes * (size_t)job.num_jpegs);
        job.order = xrealloc(job.order, sizeof(int) * (size_t)job.num_jpegs);
        job.jpegs[n] = read_jpeg(line);
        jpeg_mem_src(&w->decoder, job.jpegs[n].bytes, job.jpegs[n].size);
        jpeg_read_header(&w->decoder, TRUE);
        job.sizes[n][0] = (int)w->decoder.image_width, job.sizes[n][1] = (int)w->decoder.image_height;
        jpeg_abort_decompress(&w->decoder);
        uint64_t state = (uint64_t)n;
        int other = (int)(next_random(&state) % (uint64_t)job.num_jpegs); /* a shuffle from inside out */
        job.order[n] = job.order[other];
        job.order[other] = n;
    }
    fclose(file);
    free(line);
    free_worker(w);
}

static enum work parse_work(const char *name) {
    for (int i = 0; i < 4; i++)
        if (!strcmp(name, WORKS[i])) return (enum work)i;
    fprintf(stderr, "limit: WORK is full, region, bilinear or antialias, not %s\n", name);
    exit(1);
}

static int bench(char **a) {
    read_list(a[2]);
    job.work = parse_work(a[3]), job.floats = !strcmp(a[4], "float32");
    int threads = atoi(a[5]), warmup = atoi(a[7]), images = atoi(a[8]);
    job.batch = atoi(a[6]);
    size_t bytes = (size_t)job.batch * SIZE * ROW * (job.floats ? sizeof(float) : 1);
    for (int i = 0; i < BATCHES; i++) memset(job.batches[i] = aligned(bytes), 0, bytes);
    timed(warmup, threads);
    double seconds = timed(images, threads);
    printf("{\"images\": %d, \"seconds\": %.6f}\n", images, seconds);
    return 0;
}

static int one(char **a) {
    enum work work = parse_work(a[3]);
    bool floats = !strcmp(a[4], "float32");
    jpeg_t jpeg = read_jpeg(a[2]);
    box_t box = {atoi(a[5]), atoi(a[6]), atoi(a[7]), atoi(a[8]), atoi(a[9])};
    size_t bytes = (size_t)SIZE * ROW * (floats ? sizeof(float) : 1);
    void *out = aligned(bytes);
    process(new_worker(), &jpeg, work, floats, box, out);
    FILE *file = fopen(a[10], "wb");
    if (!file || fwrite(out, 1, bytes, file) != bytes || fclose(file)) {
        perror(a[10]);
        return 1;
    }
    return 0;
}

int main(int argc, char **argv) {
    static const float mean[] = {0.485f, 0.456f, 0.406f}, deviation[] = {0.229f, 0.224f, 0.225f};
    for (int i = 0; i < ROW; i++) {
        SCALE[i] = 1 / (255 * (float)(1 << KEPT_BITS) * deviation[i % CHANNELS]);
        BIAS[i] = -mean[i % CHANNELS] / deviation[i % CHANNELS];
    }
    mallopt(M_MMAP_THRESHOLD, 32 << 20); /* or the kernel clears the decoder's pages for every image */
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    if (argc == 9 && !strcmp(argv[1], "bench")) return bench(argv);
    if (argc == 11 && !strcmp(argv[1], "one")) return one(argv);
    fputs("limit: see the head of limit.c for the arguments\n", stderr);
    return 2;
}
