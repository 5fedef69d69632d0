// What attention_sm90.cu reads, from a product's output: queries and keys normalised by RMS, rotated and
// rounded to int8, and values rounded to FP8, in tiles of 128 tokens of one head (attention.py says how
// tiles lie).
//
// A block of threads makes the tiles of one place and some heads: queries, keys, values, one after the other.
// So the rotations, which are twice as many bytes as a head's queries, are still near for the next head.
// Another block computes while one waits for memory.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Defined by the command that compiles: CHANNELS = 128 of a head, padding included; KEYS = 128, of a tile;
// HEADS_EACH and WARPS: of a block; PIECE = 8, values of 16 bits that are read at a time; the others: as in
// reference.py.
constexpr int SHARING = 32 * WARPS / KEYS;            // threads that share a row of queries or keys
constexpr int PIECES = CHANNELS / (SHARING * PIECE);  // of a row, for each of them
constexpr int STRIDE = SHARING * PIECE;               // channels from one of them to the next
constexpr int TOKENS = 4;  // of values, for each thread: a word of FP8 for each channel
constexpr u32 ALL = 0xFFFFFFFF;
constexpr float ROUND = 12582912;  // 1.5 * 2^23: added, it leaves an integer in the lowest bits
static_assert(KEYS == 32 * TOKENS && CHANNELS == WARPS * PIECE && SHARING == 4, "as threads are numbered");

__device__ __forceinline__ float lower(u32 pair) { return __uint_as_float(pair << 16); }

__device__ __forceinline__ float upper(u32 pair) { return __uint_as_float(pair & 0xFFFF0000); }

__device__ __forceinline__ void widen(uint4 piece, float (&values)[PIECE]) {
    const u32 pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        values[2 * i] = lower(pairs[i]);
        values[2 * i + 1] = upper(pairs[i]);
    }
}

// The larger absolute value, or NaN where one is: a scale made of it carries it on.
__device__ __forceinline__ float larger(float a, float b) {
    float found;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(fabsf(a)), "f"(fabsf(b)));
    return found;
}

// Of all threads of the block, of numbers that are not negative: their bits are ordered as they are, NaN last.
__device__ __forceinline__ float largest(float value, u32 (&of_warps)[WARPS]) {
    const u32 found = __reduce_max_sync(ALL, __float_as_uint(value));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = found;
    __syncthreads();
    return __uint_as_float(__reduce_max_sync(ALL, of_warps[threadIdx.x % WARPS]));
}

// As in attention_sm90.cu: a header would not be part of what compiled kernels are found again by.
__device__ __forceinline__ u32 fp8x4(float a, float b, float c, float d) {
    u32 found;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}\n"
        : "=r"(found)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return found;
}

// Four numbers, times a factor, rounded to integers of 8 bits, the first in the lowest byte.
__device__ __forceinline__ u32 int8x4(const float* values, float factor) {
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(fmaf(values[i], factor, ROUND));
    return __byte_perm(__byte_perm(bits[0], bits[1], 0x0040), __byte_perm(bits[2], bits[3], 0x0040), 0x5410);
}

// A thread's share of one token's queries or keys: pieces whose first channels are STRIDE apart.
struct Row {
    const u16* qkv;        // of the first head's queries
    const float* rope;     // cosine and sine of each pair of channels
    const float* weights;  // of the norm of queries; those of keys are CHANNELS further on
    int left;              // channels from the first piece on, or 0 where no token is
};

// One row, times the norm's weights and rotated. Returns what its RMS says to multiply it by; `most` is the
// row's largest absolute value before that.
__device__ __forceinline__ float turn(const Row& row, u32 offset, int part, float inverse_size,
                                      float (&turned)[PIECES][PIECE], float& most) {
    uint4 pieces[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        pieces[i] = {0, 0, 0, 0};
        if (i * STRIDE < row.left) pieces[i] = __ldg(reinterpret_cast<const uint4*>(row.qkv + offset + i * STRIDE));
    }
    float squares = 0;
    most = 0;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        float4 rope[2] = {};  // cosines and sines of four pairs
        if (i * STRIDE < row.left) {
            rope[0] = __ldg(reinterpret_cast<const float4*>(row.rope + i * STRIDE));
            rope[1] = __ldg(reinterpret_cast<const float4*>(row.rope + i * STRIDE) + 1);
        }
        float x[PIECE];
        widen(pieces[i], x);
#pragma unroll
        for (int c = 0; c < PIECE; ++c) {
            squares = fmaf(x[c], x[c], squares);
            x[c] *= row.weights[part * CHANNELS + i * STRIDE + c];
        }
#pragma unroll
        for (int c = 0; c < PIECE; c += 2) {
            const float4 both = rope[c / 4];
            const float cosine = c % 4 ? both.z : both.x, sine = c % 4 ? both.w : both.y;
            turned[i][c] = x[c] * cosine - x[c + 1] * sine;
            turned[i][c + 1] = x[c] * sine + x[c + 1] * cosine;
            most = larger(most, larger(turned[i][c], turned[i][c + 1]));
        }
    }
#pragma unroll
    for (int lanes = 1; lanes < SHARING; lanes *= 2) {
        squares += __shfl_xor_sync(ALL, squares, lanes);
        most = larger(most, __shfl_xor_sync(ALL, most, lanes));
    }
    return rsqrtf(fmaf(squares, inverse_size, EPSILON));
}

// The thread's share of row `at` of a tile.
__device__ __forceinline__ void store_row(u8* tile, int at, const float (&row)[PIECES][PIECE], float factor) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        const int channel = PIECE * (threadIdx.x % SHARING) + i * STRIDE;
        const uint2 bytes = {int8x4(row[i], factor), int8x4(row[i] + 4, factor)};
        *reinterpret_cast<uint2*>(tile + at * CHANNELS + ((channel / 16) ^ (at % 8)) * 16 + channel % 16) = bytes;
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
to_tiles(const u16* __restrict__ qkv, const u16* __restrict__ norms, const float* __restrict__ rope,
         const int* __restrict__ owners, u8* __restrict__ queries, u8* __restrict__ keys, u8* __restrict__ values,
         float* __restrict__ query_scales, float2* __restrict__ scales, int text_tokens, int heads, int size,
         float inverse_size, float exponent) {
    __shared__ u32 of_keys[WARPS], of_values[WARPS];
    __shared__ float weights[2][2][CHANNELS];  // of prompts and pictures, of queries and keys
    for (int i = threadIdx.x; i < 4 * CHANNELS; i += 32 * WARPS) {
        const int channel = i % CHANNELS;
        weights[i / CHANNELS / 2][i / CHANNELS % 2][channel] =
            channel < size ? lower(norms[i / CHANNELS * size + channel]) : 0;
    }
    __syncthreads();

    const int lane = threadIdx.x % 32, tile = blockIdx.y, width = heads * size;
    const int number = threadIdx.x / SHARING, first_channel = PIECE * (threadIdx.x % SHARING);
    const int owner = owners[tile * KEYS + number];
    const u64 token = max(owner, 0);
    const Row row = {qkv + token * 3 * width + first_channel, rope + token * size + first_channel,
                     weights[owner >= text_tokens][0] + first_channel, owner < 0 ? 0 : size - first_channel};
    // Of each sixteen keys, in which row which one stands: attention.py says why.
    const int at = number / 16 * 16 + number / 2 % 2 * 8 + number / 4 % 4 * 2 + number % 2;
    // Of values each thread has four tokens, and each warp eight channels.
    const int4 four = reinterpret_cast<const int4*>(owners + tile * KEYS)[lane];
    const int owners_of_values[TOKENS] = {four.x, four.y, four.z, four.w};
    const int channel_of_values = PIECE * (threadIdx.x / 32);

    const int first = blockIdx.x * HEADS_EACH, last = min(first + HEADS_EACH, heads);
    for (int head = first; head < last; ++head) {
        const u64 start = ((u64)head * gridDim.y + tile) * KEYS;
        float turned[PIECES][PIECE], most;

        float norm = turn(row, head * size, 0, inverse_size, turned, most);
        const float query_scale = larger(most * norm, LEAST_AMAX) * (1 / INT8_MAX);
        if (threadIdx.x % SHARING == 0) query_scales[start + number] = query_scale * exponent;
        store_row(queries + start * CHANNELS, number, turned, __fdividef(norm, query_scale));

        norm = turn(row, width + head * size, 1, inverse_size, turned, most);
        const float key_scale = largest(larger(most * norm, LEAST_AMAX), of_keys) * (1 / INT8_MAX);
        store_row(keys + start * CHANNELS, at, turned, __fdividef(norm, key_scale));

        float x[TOKENS][PIECE], most_of_values = LEAST_VALUE;
#pragma unroll
        for (int i = 0; i < TOKENS; ++i) {
            uint4 piece = {0, 0, 0, 0};
            if (owners_of_values[i] >= 0 && channel_of_values < size)
                piece = __ldg(reinterpret_cast<const uint4*>(
                    qkv + ((u64)owners_of_values[i] * 3 + 2) * width + head * size + channel_of_values));
            widen(piece, x[i]);
#pragma unroll
            for (int c = 0; c < PIECE; ++c) most_of_values = larger(most_of_values, x[i][c]);
        }
        const float value_scale = largest(most_of_values, of_values) * (1 / FP8_MAX);
        const float factor = __fdividef(1, value_scale);
        u8* to = values + start * CHANNELS + channel_of_values * KEYS + lane % 4 * TOKENS;
#pragma unroll
        for (int c = 0; c < PIECE; ++c)
            *reinterpret_cast<u32*>(to + c * KEYS + ((lane / 4) ^ (c % 8)) * 16) =
                fp8x4(x[0][c] * factor, x[1][c] * factor, x[2][c] * factor, x[3][c] * factor);
        if (threadIdx.x == 0) scales[head * gridDim.y + tile] = {key_scale, log2f(value_scale)};
    }
}
