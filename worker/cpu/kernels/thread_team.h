/* Functions that all threads of an OpenMP team call together. Each one divides its work among the
 * threads and returns when all of it is done. */
#include <stdint.h>

enum kind { FLOAT32 = 0, BFLOAT16 = 1 };
enum activation { NONE = 0, SWISH = 1 };

/* The work of add_norm, attend and multiply in decode_ops.c, which start a team for it. */
void norm_rows(float *hidden, const void *delta, int delta_kind, const float *weight, float eps, void *out, int out_kind, int64_t N,
               int64_t E);
/* Returns 0, or 1 if this thread could not allocate memory. */
int attend_rows(const void *projected, int kind, const float *cos, const float *sin, void *keys, void *values, int cache_kind,
                const int64_t *starts, void *out, int64_t N, int64_t Q, int64_t H, int64_t K, int64_t D, int64_t width,
                int64_t column, float scaling);
void multiply_all(void *a, const void *b, int kind, int64_t count);

/* A bfloat16 tile: SIDE rows of an operand by DEPTH elements along the summed dimension. */
enum { SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH };

/* The work of multiply_tiles in tiled_matmul.c. Each thread must first call configure_tiles with M.
 * The struct is the AMX tile configuration, as the processor reads it. */
struct configuration {
    uint8_t palette, start_row, unused[14];
    uint16_t bytes_a_row[16];
    uint8_t rows[16];
} __attribute__((aligned(64)));
int has_tiles(void);
struct configuration configure_tiles(int64_t M); /* returns the previous configuration; */
void restore_tiles(struct configuration before); /* oneDNN assumes that it is unchanged */
void multiply_groups(const uint16_t *x, const uint16_t *tiles, const float *bias, uint16_t *out, int64_t M, int64_t N, int64_t K,
                     int activation);

/* The work of multiply_int8 in int8_matmul.c. */
void multiply_int8_panels(const uint16_t *x, const uint8_t *weights, const float *bias, uint16_t *out,
                          int64_t M, int64_t N, int64_t K, int activation);
