/* What a team of threads does together: each of these is called by all of them, shares the work out and ends when it is done. */
#include <stdint.h>

enum kind { FLOAT32 = 0, BFLOAT16 = 1 };
enum activation { NONE = 0, SWISH = 1 };

/* As add_norm, attend and multiply in decode_ops.c, which make a team for it. */
void norm_rows(float *hidden, const void *delta, int delta_kind, const float *weight, float eps, void *out, int out_kind, int64_t N,
               int64_t E);
/* Returns 0, or 1 if this thread had no memory. */
int attend_rows(const void *projected, int kind, const float *cos, const float *sin, void *keys, void *values, int cache_kind,
                const int64_t *starts, void *out, int64_t N, int64_t Q, int64_t H, int64_t K, int64_t D, int64_t width,
                int64_t column, float scaling);
void multiply_all(void *a, const void *b, int kind, int64_t count);

/* A tile of bfloat16: rows of an operand and what is summed along. */
enum { SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH };

/* As multiply_tiles in tiled_matmul.c, on threads whose tiles are configured for M rows. */
struct configuration {
    uint8_t palette, start_row, unused[14];
    uint16_t bytes_a_row[16];
    uint8_t rows[16];
} __attribute__((aligned(64)));
int has_tiles(void);
struct configuration configure_tiles(int64_t M); /* gives what was before, */
void restore_tiles(struct configuration before); /* which oneDNN remembers */
void multiply_groups(const uint16_t *x, const uint16_t *tiles, const float *bias, uint16_t *out, int64_t M, int64_t N, int64_t K,
                     int activation);

/* As multiply_int8 in int8_matmul.c. */
void multiply_int8_panels(const uint16_t *x, const uint8_t *weights, const float *bias, uint16_t *out,
                          int64_t M, int64_t N, int64_t K, int activation);
