// Softmax attention for Hopper: queries times keys in int8, softmax's weights times values in FP8.
//
// A block of threads takes tasks, one after the other: 192 queries of one head. Three warpgroups of 64
// queries each compute; of the fourth one thread copies. Keys and values come in tiles of 128 tokens that
// lie in memory as the tensor cores read them (attention.py says how), so a tile is one bulk copy. While
// one warpgroup computes weights, the tensor cores multiply for the others.
//
// - Weights are 2 to the power of a product less a running maximum; queries' scales hold log2(e) / sqrt(D).
// - A tile's values have one scale. Its logarithm is added to the exponents, so that nothing has to be
//   scaled after the product; the running maximum counts it in, so weights stay in FP8's range.
// - The tensor cores keep about 14 bits of a running FP8 sum. So they sum 128 values at most: over 8,448 of
//   them the result came out 3.6% too small, and this way 0.1%.
// - Behind a tile's channels stand eight of ones, in shared memory only: the product sums the weights, too.

typedef unsigned int u32;
typedef unsigned long long u64;

// Defined by the command that compiles: CHANNELS = 128 of a head, padding included; KEYS = 128, of a
// tile; GROUPS = 3, warpgroups that compute; STAGES = 4, tiles of keys, and of values, on their way.
constexpr int QUERIES = 64;       // of a warpgroup
constexpr int TILE = KEYS * CHANNELS;  // bytes, of keys as of values
constexpr int ONES = KEYS * 8;    // bytes
constexpr int QUERY_BYTES = GROUPS * QUERIES * CHANNELS;
constexpr float HEADROOM = 8.0f;  // weights end at 2^8: FP8 ends at 448, and small ones keep their bits
constexpr int NOTHING = -(1 << 30);  // below every product of 128 int8 values
constexpr u32 ALL = 0xFFFFFFFF;

struct Shared {
    unsigned char queries[QUERY_BYTES];
    unsigned char keys[STAGES][TILE];
    unsigned char values[STAGES][TILE + ONES];
    u64 queries_full, queries_empty;
    u64 keys_full[STAGES], keys_empty[STAGES], values_full[STAGES], values_empty[STAGES];
};

// Queries from `start` on, of a row whose tokens are [first, last). All are places: tokens in joint order,
// each row padded to whole tiles.
struct Task {
    int start, first, last, unused;
};

// Barriers in shared memory. A phase ends with the last arrival and the last byte that it waits for.

__device__ __forceinline__ u32 address(const void* shared) {
    return static_cast<u32>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void init(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals));
}

__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ __forceinline__ void wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(address(barrier)), "r"(parity)
        : "memory");
}

__device__ __forceinline__ void copy(void* shared, const void* global, u32 bytes, u64* barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            address(shared)),
        "l"(global), "r"(bytes), "r"(address(barrier))
        : "memory");
}

// Turns: the warpgroups multiply queries and keys one at a time, and so get out of step.

__device__ __forceinline__ void take_turn(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
}

__device__ __forceinline__ void pass_turn(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(1 + (group + 1) % GROUPS) : "memory");
}

// Products, by a whole warpgroup, of matrices in shared memory: rows of 128 bytes, swizzled. Of 64 rows of
// a result a thread has number lane / 4 of its warp's sixteen, and the one eight below. Element i is in
// the second of them where i / 2 is odd, and in column i / 4 * 8 + lane % 4 * 2 + i % 2.

__device__ __forceinline__ u64 matrix(const void* shared) {
    // Bits 0-13: address / 16; 32-45: bytes between groups of eight rows / 16; 62-63: the swizzle.
    return ((u64)1 << 62) | ((u64)(8 * 128 / 16) << 32) | ((u64)1 << 16) | ((address(shared) & 0x3FFFF) >> 4);
}

#define R4(f, i) f((i)), f((i) + 1), f((i) + 2), f((i) + 3)
#define R16(f, i) R4(f, i), R4(f, (i) + 4), R4(f, (i) + 8), R4(f, (i) + 12)
#define R64(f) R16(f, 0), R16(f, 16), R16(f, 32), R16(f, 48)
#define NAMES_64                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// sums (+)= 64 queries x 32 bytes, times 128 keys x 32 bytes.
__device__ __forceinline__ void multiply_int8(int (&sums)[68], u64 queries, u64 keys, int add) {
#define SUM(i) "+r"(sums[i])
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" NAMES_64 "}, %64, %65, add;\n"
        "}\n"
        : R64(SUM)
        : "l"(queries), "l"(keys), "r"(add));
#undef SUM
}

// sums (+)= 64 queries x 32 weights, in registers, times 136 channels x 32 values.
__device__ __forceinline__ void multiply_fp8(float (&sums)[68], const u32* weights, u64 values, int add) {
#define SUM(i) "+f"(sums[i])
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %73, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n136k32.f32.e4m3.e4m3 {" NAMES_64
        ", %64, %65, %66, %67}, {%68, %69, %70, %71}, %72, add, 1, 1;\n"
        "}\n"
        : R64(SUM), R4(SUM, 64)
        : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "l"(values), "r"(add));
#undef SUM
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void end_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Numbers.

__device__ __forceinline__ float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

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

__device__ __forceinline__ u32 bf16x2(float low, float high) {
    u32 found;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(high), "f"(low));
    return found;
}

// The largest of four lanes that share a row.
__device__ __forceinline__ int row_max(int x) {
    x = max(x, __shfl_xor_sync(ALL, x, 1));
    return max(x, __shfl_xor_sync(ALL, x, 2));
}

// What one thread holds: products of queries and keys, then their weights, then weighted values.
union Products {
    int sums[68];
    float reals[68];
};

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * 128, 1)
attend(const unsigned char* __restrict__ queries, const unsigned char* __restrict__ keys,
       const unsigned char* __restrict__ values, const float* __restrict__ query_scales,
       const float2* __restrict__ tile_scales, const Task* __restrict__ tasks, const int* __restrict__ owners,
       unsigned short* __restrict__ result, int task_count, int heads, int places, int size) {
    extern __shared__ unsigned char memory[];
    Shared& shared = *reinterpret_cast<Shared*>((reinterpret_cast<u64>(memory) + 1023) & ~(u64)1023);
    const int group = __shfl_sync(ALL, threadIdx.x / 128, 0);
    const int all = task_count * heads;
    if (threadIdx.x == 0) {
        init(&shared.queries_full, 1);
        init(&shared.queries_empty, GROUPS);
        for (int stage = 0; stage < STAGES; ++stage) {
            init(&shared.keys_full[stage], 1);
            init(&shared.values_full[stage], 1);
            init(&shared.keys_empty[stage], GROUPS);
            init(&shared.values_empty[stage], GROUPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int i = threadIdx.x; i < STAGES * ONES; i += blockDim.x) shared.values[i / ONES][TILE + i % ONES] = 0x38;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();

    if (group == GROUPS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x % 128 != 0) return;
        u32 tile = 0, turn = 0;
        for (int number = blockIdx.x; number < all; number += gridDim.x, ++turn) {
            const Task task = tasks[number % task_count];
            const u64 head = number / task_count;
            wait(&shared.queries_empty, (turn & 1) ^ 1);
            copy(shared.queries, queries + (head * places + task.start) * CHANNELS, QUERY_BYTES, &shared.queries_full);
            for (int place = task.first; place < task.last; place += KEYS, ++tile) {
                const u32 stage = tile % STAGES, parity = (tile / STAGES & 1) ^ 1;
                const u64 from = (head * places + place) * CHANNELS;
                wait(&shared.keys_empty[stage], parity);
                copy(shared.keys[stage], keys + from, TILE, &shared.keys_full[stage]);
                wait(&shared.values_empty[stage], parity);
                copy(shared.values[stage], values + from, TILE, &shared.values_full[stage]);
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    const int lane = threadIdx.x % 32;
    const int own = group * QUERIES + threadIdx.x % 128 / 32 * 16 + lane / 4;  // and the query eight below
    const bool leads = threadIdx.x % 128 == 0;
    const u64 own_queries = matrix(shared.queries + group * QUERIES * CHANNELS);
    u32 tile = 0, turn = 0;
    if (group == GROUPS - 1) pass_turn(group);
    for (int number = blockIdx.x; number < all; number += gridDim.x, ++turn) {
        const Task task = tasks[number % task_count];
        const int head = number / task_count;
        const float* scale_of_query = query_scales + (u64)head * places + task.start + own;
        const float query_scale[2] = {scale_of_query[0], scale_of_query[8]};
        const float2* scales_of_tile = tile_scales + ((u64)head * places + task.first) / KEYS;
        float2 next_scales = __ldg(scales_of_tile);
        float highest[2] = {-1e30f, -1e30f}, total[2] = {0, 0}, mixed[64];
#pragma unroll
        for (int i = 0; i < 64; ++i) mixed[i] = 0;
        wait(&shared.queries_full, turn & 1);

        for (int left = task.last - task.first; left > 0; left -= KEYS, ++tile) {
            const u32 stage = tile % STAGES, parity = tile / STAGES & 1;
            const float key_scale = next_scales.x, lift = next_scales.y;  // lift: the value scale's logarithm
            Products now;
            wait(&shared.keys_full[stage], parity);
            take_turn(group);
            begin_products();
#pragma unroll
            for (int part = 0; part < CHANNELS / 32; ++part)
                multiply_int8(now.sums, own_queries + 2 * part, matrix(shared.keys[0]) + stage * (TILE / 16) + 2 * part, part);
            end_products();
            pass_turn(group);
            if (leads) arrive(&shared.keys_empty[stage]);
            if (left > KEYS) next_scales = __ldg(++scales_of_tile);

            // Keys lie in such an order within 16 that a thread's weights of four keys in a row, which the
            // next product wants in one register, are elements i, i + 1, i + 4 and i + 5.
            if (left < KEYS) {  // the row ends in this tile
#pragma unroll
                for (int i = 0; i < 64; ++i) {
                    const int key = i / 8 * 16 + lane % 4 * 4 + i / 4 % 2 * 2 + i % 2;
                    if (key >= left) now.sums[i] = NOTHING;
                }
            }
            float fade[2];  // of what was summed so far
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int most[4];
#pragma unroll
                for (int i = 0; i < 64; i += 4) {
                    const int more = max(now.sums[i + 2 * half], now.sums[i + 2 * half + 1]);
                    most[i / 4 % 4] = i < 16 ? more : max(most[i / 4 % 4], more);
                }
                const int top = row_max(max(max(most[0], most[1]), max(most[2], most[3])));
                const float factor = query_scale[half] * key_scale;
                const float peak = fmaxf(highest[half], fmaf(static_cast<float>(top), factor, lift));
                fade[half] = exp2(highest[half] - peak);
                highest[half] = peak;
                const float shift = HEADROOM + lift - peak;
#pragma unroll
                for (int i = 2 * half; i < 64; i += 4) {
                    now.reals[i] = exp2(fmaf(static_cast<float>(now.sums[i]), factor, shift));
                    now.reals[i + 1] = exp2(fmaf(static_cast<float>(now.sums[i + 1]), factor, shift));
                }
            }
            u32 weights[16];  // 4 p: of keys from 32 p on, first query; + 1: second; + 2 and 3: of 16 keys on
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                const int at = i / 4 * 16 + i / 2 % 2 * 8 + i % 2 * 2;
                weights[i] = fp8x4(now.reals[at], now.reals[at + 1], now.reals[at + 4], now.reals[at + 5]);
            }
            if (left < KEYS) {
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    const int there = min(max(left - (i / 2 * 16 + lane % 4 * 4), 0), 4);
                    weights[i] &= static_cast<u32>(((u64)1 << 8 * there) - 1);
                }
            }
            wait(&shared.values_full[stage], parity);
            begin_products();
#pragma unroll
            for (int part = 0; part < KEYS / 32; ++part)
                multiply_fp8(now.reals, weights + 4 * part, matrix(shared.values[0]) + stage * ((TILE + ONES) / 16) + 2 * part, part);
            end_products();
            if (leads) arrive(&shared.values_empty[stage]);
#pragma unroll
            for (int i = 0; i < 64; ++i) mixed[i] = fmaf(mixed[i], fade[i / 2 % 2], now.reals[i]);
            const float drop = exp2(-lift);  // weights were lifted, and their sum must not be
            total[0] = fmaf(total[0], fade[0], now.reals[64] * drop);
            total[1] = fmaf(total[1], fade[1], now.reals[66] * drop);
        }
        if (leads) arrive(&shared.queries_empty);

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int place = task.start + own + 8 * half;
            if (place >= task.last) continue;
            const float factor = 1 / total[half];
            u32* to = reinterpret_cast<u32*>(result + ((u64)owners[place] * heads + head) * size) + lane % 4;
#pragma unroll
            for (int i = 0; i < 64; i += 4)
                if (i * 2 < size) to[i] = bf16x2(mixed[i + 2 * half] * factor, mixed[i + 2 * half + 1] * factor);
        }
    }
}
