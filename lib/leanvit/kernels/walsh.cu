// Block-wise 2-D Walsh-Hadamard projection of a token grid, and its adjoint.
//
//   project  (B, prefix + h*w, C) -> (B, prefix + P*R, C)   z[p*R + i] = sum_{u,v} W[r_i,u] W[c_i,v] x[p][u,v] / ORDER
//   expand   (B, prefix + P*R, C) -> (B, prefix + h*w, C)   its adjoint for zero padding: inverse transform, then crop
//   fold     like expand, the adjoint for mirrored padding: a token gathers its mirror images too
//
// Compile with -DORDER=n -DBASIS_ROWS=r0,r1,.. -DBASIS_COLS=c0,c1,.. (sequencies), -DSCALAR=0|1|2 (fp32, fp16, bf16)
// and -DMAX_HELD=36, the coefficients that the registers of one thread may hold. cuda.py does, and plans the launches.
//
// The channels are the lanes: one thread owns one block of ORDER x ORDER tokens and VECTOR neighbouring channels. It
// streams over the rows of the block, two at a time, transforms them in registers and keeps only the coefficients that
// are wanted, so nothing is staged and padding is index arithmetic. GROUPS > 1 splits the rows over threadIdx.y, for
// launches that would leave most of the machine idle. Sums are fp32, in a fixed order: the same input, the same bits.
//
// The input has any strides (in elements), the output is contiguous. One thread block does one piece of work, with
// blockIdx.x = ((image * pieces + piece) * chunks + chunk) * tiles + tile: neighbours read neighbouring channels.
// Offsets inside one row of tokens, and inside the coefficients of one block, must fit 32 bits; others have 64.

#if SCALAR == 1
#include <cuda_fp16.h>
typedef __half scalar;
__device__ inline float to_float(scalar a) { return __half2float(a); }
__device__ inline scalar from_float(float a) { return __float2half(a); }
#elif SCALAR == 2
#include <cuda_bf16.h>
typedef __nv_bfloat16 scalar;
__device__ inline float to_float(scalar a) { return __bfloat162float(a); }
__device__ inline scalar from_float(float a) { return __float2bfloat16(a); }
#else
typedef float scalar;
__device__ inline float to_float(scalar a) { return a; }
__device__ inline scalar from_float(float a) { return a; }
#endif

typedef long long i64;

__device__ constexpr int N = ORDER;
__device__ constexpr int ROW[] = {BASIS_ROWS};
__device__ constexpr int COL[] = {BASIS_COLS};
__device__ constexpr int R = sizeof(ROW) / sizeof(int);
__device__ constexpr int CHUNKS = (R + MAX_HELD - 1) / MAX_HELD;
__device__ constexpr int CHUNK = (R + CHUNKS - 1) / CHUNKS;
static_assert(sizeof(ROW) == sizeof(COL), "BASIS_ROWS and BASIS_COLS differ in length");
static_assert(N == 2 || N == 4 || N == 8 || N == 16, "ORDER must be 2, 4, 8 or 16");

// Walsh function of sequency s: row natural[s] of the Sylvester matrix; bit t of signs[s] is set where its value is -1.
struct Walsh {
    int natural[N];
    unsigned signs[N];
    __device__ constexpr Walsh() : natural(), signs()
    {
        for (int s = 0; s < N; ++s) {
            for (int bit = 1; bit < N; bit *= 2) natural[s] = 2 * natural[s] + (((s ^ (s >> 1)) & bit) ? 1 : 0);
            for (int t = 0; t < N; ++t)
                for (int m = natural[s] & t; m; m &= m - 1) signs[s] ^= 1u << t;
        }
    }
};
__device__ constexpr Walsh WALSH;

__device__ constexpr float walsh(int sequency, int t) { return ((WALSH.signs[sequency] >> t) & 1) ? -1.f : 1.f; }
__device__ constexpr int odd(int sequency) { return WALSH.natural[sequency] & 1; }    // signs 2m and 2m + 1 differ

__device__ constexpr unsigned columns(int parity)                    // the columns that such bases use, natural indices
{
    unsigned mask = 0;
    for (int i = 0; i < R; ++i)
        if (odd(ROW[i]) == parity) mask |= 1u << WALSH.natural[COL[i]];
    return mask;
}

template <int V> struct alignas(V * sizeof(scalar)) Pack { scalar lane[V]; };

template <int V> __device__ void load(const scalar* from, float (&to)[V])
{
    const Pack<V> pack = *reinterpret_cast<const Pack<V>*>(from);
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = to_float(pack.lane[j]);
}

template <int V> __device__ void store(scalar* to, const float (&from)[V], float scale)
{
    Pack<V> pack;
#pragma unroll
    for (int j = 0; j < V; ++j) pack.lane[j] = from_float(from[j] * scale);
    *reinterpret_cast<Pack<V>*>(to) = pack;
}

// Unscaled Hadamard transform in natural order; entries outside LIVE are taken as zero and cost nothing.
template <unsigned LIVE, int V> __device__ void butterfly(float (&a)[N][V])
{
    unsigned live = LIVE;
#pragma unroll
    for (int d = 1; d < N; d *= 2) {
        unsigned next = 0;
#pragma unroll
        for (int s = 0; s < N; ++s) {
            if (s & d) continue;
            const bool low = (live >> s) & 1, high = (live >> (s | d)) & 1;
            if (low || high) next |= (1u << s) | (1u << (s | d));
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float p = a[s][j], q = a[s | d][j];
                if (low && high) { a[s][j] = p + q; a[s | d][j] = p - q; }
                else if (low) { a[s | d][j] = p; }
                else if (high) { a[s][j] = q; a[s | d][j] = -q; }
            }
        }
        live = next;
    }
}

// Where a thread block works. Every value is the same for all its threads.
struct Place {
    int down, across;        // blocks of the grid, by rows and columns
    int top, left;           // padding before the first row and column
    int piece, chunk;
    i64 image;
    __device__ Place(int h, int w, int pieces, int chunks, int tiles)
    {
        down = (h + N - 1) / N;
        across = (w + N - 1) / N;
        top = (down * N - h + 1) / 2;
        left = (across * N - w + 1) / 2;
        if (!pieces) pieces = down * across;
        const unsigned at = blockIdx.x / tiles;
        chunk = at % chunks;
        piece = at / chunks % pieces;
        image = at / chunks / pieces;
    }
};

// The token to read for padded position `at`: mirrored without repeating the border, or the nearest for zero padding,
// where the value is dropped again: so every address is valid, and no load hides behind a branch.
__device__ inline int source(int at, int size, int reflect)
{
    const int nearest = at < 0 ? 0 : at < size ? at : size - 1;
    return nearest + reflect * (nearest - at);
}

template <int V>
__device__ void copy_prefix(const scalar* in, scalar* out, int stride, int channels, int prefix)
{
#pragma unroll 1
    for (int t = 0; t < prefix; ++t)
        *reinterpret_cast<Pack<V>*>(out + i64(t) * channels) = *reinterpret_cast<const Pack<V>*>(in + i64(t) * stride);
}

// The coefficients K*CHUNK .. of one block; `in` is token 0 of the grid, `out` coefficient 0 of the block.
template <int V, int GROUPS, int K>
__device__ void project_chunk(const scalar* in, scalar* out, const Place& at, int stride, int channels, int h, int w,
                              int reflect, bool active, float* shared)
{
    constexpr int FIRST = K * CHUNK, COUNT = R - FIRST < CHUNK ? R - FIRST : CHUNK, ROWS = N / GROUPS;
    constexpr unsigned ALL = (1u << N) - 1;
    const int u0 = GROUPS > 1 ? threadIdx.y * ROWS : 0;
    const int y0 = at.piece / at.across * N - at.top, x0 = at.piece % at.across * N - at.left;
    const bool zeros = !reflect && (y0 < 0 || x0 < 0 || y0 + N > h || x0 + N > w);
    int dx[N];
#pragma unroll
    for (int v = 0; v < N; ++v) dx[v] = source(x0 + v, w, reflect) * stride;
    float sum[COUNT][V] = {};
#pragma unroll 1
    for (int u = u0; active && u < u0 + ROWS; u += 2) {
        float a[2][N][V];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const scalar* line = in + i64(source(y0 + u + k, h, reflect)) * w * stride;
#pragma unroll
            for (int v = 0; v < N; ++v) load(line + dx[v], a[k][v]);
        }
        if (zeros) {
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int v = 0; v < N; ++v) {
                    const int y = y0 + u + k, x = x0 + v;
#pragma unroll
                    for (int j = 0; j < V; ++j)
                        if (y < 0 || y >= h || x < 0 || x >= w) a[k][v][j] = 0;
                }
        }
#pragma unroll
        for (int v = 0; v < N; ++v)
#pragma unroll
            for (int j = 0; j < V; ++j) {
                const float p = a[0][v][j], q = a[1][v][j];
                a[0][v][j] = p + q;
                a[1][v][j] = p - q;
            }
        butterfly<ALL>(a[0]);
        butterfly<ALL>(a[1]);
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
#pragma unroll
            for (int j = 0; j < V; ++j)
                sum[i][j] += walsh(ROW[FIRST + i], u) * a[odd(ROW[FIRST + i])][WALSH.natural[COL[FIRST + i]]][j];
    }
    out += i64(FIRST) * channels;
    if constexpr (GROUPS == 1) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) store(out + i64(i) * channels, sum[i], 1.f / N);
    } else {
        const int lanes = blockDim.x * V, mine = threadIdx.x * V;
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
#pragma unroll
            for (int j = 0; j < V; ++j) shared[(threadIdx.y * COUNT + i) * lanes + mine + j] = sum[i][j];
        __syncthreads();
        if (!active) return;
        for (int i = threadIdx.y; i < COUNT; i += GROUPS) {
            float total[V] = {};
#pragma unroll
            for (int g = 0; g < GROUPS; ++g)
#pragma unroll
                for (int j = 0; j < V; ++j) total[j] += shared[(g * COUNT + i) * lanes + mine + j];
            store(out + i64(i) * channels, total, 1.f / N);
        }
    }
}

template <int V, int GROUPS, int K = 0, typename... Args> __device__ void project_any(int chunk, Args... args)
{
    if (chunk == K) project_chunk<V, GROUPS, K>(args...);
    else if constexpr (K + 1 < CHUNKS) project_any<V, GROUPS, K + 1>(chunk, args...);
}

template <int VECTOR, int GROUPS>
__global__ void __launch_bounds__(128)
project(const scalar* in, scalar* out, i64 batch_stride, i64 token_stride, i64 channel_stride, i64 size, i64 h, i64 w,
        i64 prefix, i64 reflect, i64 tiles)
{
    __shared__ float shared[GROUPS > 1 ? GROUPS * CHUNK * 32 * VECTOR : 1];
    const int channels = size, stride = token_stride;
    const int channel = (blockIdx.x % int(tiles) * blockDim.x + threadIdx.x) * VECTOR;
    const bool active = channel < channels;
    if (GROUPS == 1 && !active) return;                              // with groups, every thread must reach the barrier
    const Place at(h, w, 0, CHUNKS, tiles);
    in += at.image * batch_stride + channel * channel_stride;
    out += at.image * (prefix + i64(at.down) * at.across * R) * channels + channel;
    if (at.piece == 0 && at.chunk == 0 && threadIdx.y == 0 && active)
        copy_prefix<VECTOR>(in, out, stride, channels, prefix);
    in += prefix * token_stride;
    out += (prefix + i64(at.piece) * R) * channels;
    project_any<VECTOR, GROUPS>(at.chunk, in, out, at, stride, channels, int(h), int(w), int(reflect), active,
                                static_cast<float*>(shared));
}

template <int VECTOR, int GROUPS>
__global__ void __launch_bounds__(128)
expand(const scalar* in, scalar* out, i64 batch_stride, i64 token_stride, i64 channel_stride, i64 size, i64 h, i64 w,
       i64 prefix, i64 reflect, i64 tiles)
{
    constexpr int ROWS = N / GROUPS, V = VECTOR;
    constexpr bool HELD = R <= MAX_HELD;                             // else every two rows read the coefficients again
    const int channels = size, stride = token_stride;
    const int channel = (blockIdx.x % int(tiles) * blockDim.x + threadIdx.x) * VECTOR;
    if (channel >= channels) return;
    const Place at(h, w, 0, 1, tiles);
    in += at.image * batch_stride + channel * channel_stride;
    out += at.image * (prefix + h * w) * channels + channel;
    if (at.piece == 0 && threadIdx.y == 0) copy_prefix<VECTOR>(in, out, stride, channels, prefix);
    in += (prefix + i64(at.piece) * R) * token_stride;
    out += prefix * channels;

    const int u0 = GROUPS > 1 ? threadIdx.y * ROWS : 0;
    const int y0 = at.piece / at.across * N - at.top, x0 = at.piece % at.across * N - at.left;
    float held[HELD ? R : 1][V];
    if constexpr (HELD) {
#pragma unroll
        for (int i = 0; i < R; ++i) load(in + i * stride, held[i]);
    }
#pragma unroll 1
    for (int u = u0; u < u0 + ROWS; u += 2) {
        float a[2][N][V];
#pragma unroll
        for (int s = 0; s < 2 * N; ++s)
#pragma unroll
            for (int j = 0; j < V; ++j) a[s / N][s % N][j] = -0.f;   // -0 + z is z: the first addition costs nothing
#pragma unroll
        for (int i = 0; i < R; ++i) {
            float z[V];
            if constexpr (!HELD) load(in + i * stride, z);
#pragma unroll
            for (int j = 0; j < V; ++j)
                a[odd(ROW[i])][WALSH.natural[COL[i]]][j] += walsh(ROW[i], u) * (HELD ? held[HELD ? i : 0][j] : z[j]);
        }
        butterfly<columns(0)>(a[0]);
        butterfly<columns(1)>(a[1]);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int y = y0 + u + k;
            if (y < 0 || y >= h) continue;
            scalar* line = out + y * w * channels;
#pragma unroll
            for (int v = 0; v < N; ++v) {
                float value[V];
#pragma unroll
                for (int j = 0; j < V; ++j)
                    value[j] = !columns(1) ? a[0][v][j] : k ? a[0][v][j] - a[1][v][j] : a[0][v][j] + a[1][v][j];
                const int x = x0 + v;
                if (x >= 0 && x < w) store(line + x * channels, value, 1.f / N);
            }
        }
    }
}

// The padded positions that show token t: its own, its image before the first and behind the last one; < 0 where none.
__device__ inline int image_of(int t, int which, int size, int before, int padded)
{
    if (which == 0) return before + t;
    if (which == 1) return t > 0 ? before - t : -1;
    const int at = before + 2 * (size - 1) - t;
    return t < size - 1 && at < padded ? at : -1;
}

// One thread is one token (the prefix tokens first) and VECTOR channels. The adjoint of mirrored padding serves for the
// gradient of the op alone, never in a training step, so it is kept simple. Its sums are long, so compensated (Kahan).
template <int VECTOR>
__global__ void __launch_bounds__(128)
fold(const scalar* in, scalar* out, i64 batch_stride, i64 token_stride, i64 channel_stride, i64 size, i64 h, i64 w,
     i64 prefix, i64 reflect, i64 tiles)
{
    const int channels = size, channel = (blockIdx.x % int(tiles) * blockDim.x + threadIdx.x) * VECTOR;
    if (channel >= channels) return;
    const Place at(h, w, prefix + h * w, 1, tiles);
    const int token = at.piece - prefix, y = token / int(w), x = token % int(w);
    in += at.image * batch_stride + channel * channel_stride;
    out += (at.image * (prefix + h * w) + at.piece) * channels + channel;
    if (token < 0) {
        copy_prefix<VECTOR>(in + at.piece * token_stride, out, 0, channels, 1);
        return;
    }
    float sum[VECTOR] = {}, lost[VECTOR] = {};
#pragma unroll 1
    for (int k = 0; k < 9; ++k) {
        const int yy = image_of(y, k / 3, h, at.top, at.down * N), xx = image_of(x, k % 3, w, at.left, at.across * N);
        if (yy < 0 || xx < 0) continue;
        const scalar* block = in + (prefix + (i64(yy / N) * at.across + xx / N) * R) * token_stride;
#pragma unroll 1
        for (int i = 0; i < R; ++i) {
            float z[VECTOR];
            load(block + i * token_stride, z);
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float term = walsh(ROW[i], yy % N) * walsh(COL[i], xx % N) * z[j] - lost[j], next = sum[j] + term;
                lost[j] = (next - sum[j]) - term;
                sum[j] = next;
            }
        }
    }
    store(out, sum, 1.f / N);
}
