// Every environment variable that Viaduct reads, one row each, and the only place that reads them. Nothing is read when a
// module is imported: a getter reads at its call. Add a row to read another one.
import { ViaductError } from './errors.js'

interface EnvRow {
  readonly meaning: string
  /** What holds when the variable is not set, in words. */
  readonly unset: string
}

const rows = {
  VIADUCT_DEBUG_HANDLES: {
    meaning: '1: remember where tensors are made and freed; report leaks and say where a stale one was freed',
    unset: 'off',
  },
  VIADUCT_NUM_THREADS: { meaning: 'threads of the CPU kernels of one rank', unset: 'cores / local ranks' },
  VIADUCT_CUDA_PLUGIN: {
    meaning: 'file of the CUDA plug-in; none: there is none. Tests name one that emulates a GPU',
    unset: 'what npm run build:cuda built, else what came with the package',
  },
  VIADUCT_CUDA_LIBRARIES: {
    meaning: 'folders of cuBLASLt, cuBLAS, cuDNN and NCCL, separated by colons, searched first',
    unset: "CUDA_HOME's, .deps/cuda, those of the loader",
  },
  VIADUCT_MATMUL_ENGINE: {
    meaning: 'matmul on an NVIDIA GPU: auto, or tuned (the fastest algorithm, timed at the first call of a shape)',
    unset: "auto: the first of cuBLASLt's heuristic",
  },
  VIADUCT_GROUPED_MATMUL_ENGINE: {
    meaning:
      "products of a mixture's experts on an NVIDIA GPU: one_launch, streams (a product each, beside each other) or auto",
    unset: 'auto: one launch for small products',
  },
  VIADUCT_ATTENTION_ENGINE: {
    meaning: 'attention on an NVIDIA GPU: cudnn (nothing else), own (own kernels) or auto',
    unset: 'auto: cuDNN for the calls that it takes',
  },
  VIADUCT_ALLOW_NONDETERMINISTIC_ALGO: {
    meaning: '1: on an NVIDIA GPU equal calls may have unequal bits where that is faster (gradients of attention)',
    unset: 'equal calls have equal bits',
  },
  NCCL_MULTI_RANK_GPU_ENABLE: {
    meaning: '1: NCCL (2.30 or newer) lets several ranks share a GPU, and local ranks go round the GPUs',
    unset: 'a GPU for each rank',
  },
  VIADUCT_EMULATION_SEED: { meaning: 'order of threads where a plug-in emulates a GPU (tests)', unset: '1' },
  CUDA_HOME: { meaning: 'folder of the CUDA toolkit, whose libraries are used', unset: 'none' },
  VIADUCT_MEMORY_LIMIT: { meaning: 'most bytes of tensors on a device', unset: 'no limit' },
  OMP_NUM_THREADS: { meaning: 'threads of the CPU kernels, where VIADUCT_NUM_THREADS is not set', unset: 'see there' },
  HF_TOKEN: { meaning: 'token for the hub; sent to the endpoint alone', unset: 'the file of HF_TOKEN_PATH' },
  HF_TOKEN_PATH: { meaning: 'file of the token that `huggingface-cli login` writes', unset: 'HF_HOME/token' },
  HF_ENDPOINT: { meaning: "the hub's address", unset: 'https://huggingface.co' },
  HF_HOME: { meaning: "Hugging Face's folder", unset: 'XDG_CACHE_HOME/huggingface' },
  HF_HUB_CACHE: { meaning: 'downloaded models, shared with Python', unset: 'HF_HOME/hub' },
  HF_HUB_OFFLINE: { meaning: '1: nothing is fetched, the cache must have it', unset: 'fetched' },
  HF_HUB_DOWNLOAD_TIMEOUT: {
    meaning: 'seconds without an answer or 1 KiB after which a request is given up',
    unset: '30',
  },
  XDG_CACHE_HOME: { meaning: "the user's caches, where HF_HOME is not set", unset: '~/.cache' },
  RANK: { meaning: 'rank of this process, as torchrun sets it', unset: 'no launcher: one rank' },
  LOCAL_RANK: { meaning: 'rank on this node', unset: '0' },
  WORLD_SIZE: { meaning: 'number of ranks', unset: '1' },
  LOCAL_WORLD_SIZE: { meaning: 'number of ranks on this node', unset: '1' },
  MASTER_ADDR: { meaning: 'address of rank 0', unset: '127.0.0.1' },
  MASTER_PORT: { meaning: 'port of the rendezvous store', unset: 'chosen by the launcher' },
  GROUP_RANK: { meaning: 'rank of this node', unset: '0' },
  VIADUCT_AGENT_STORE: {
    meaning: '1: `viaduct run` keeps the rendezvous store on MASTER_PORT',
    unset: 'rank 0 keeps it',
  },
  VIADUCT_MASTER_PORT: {
    meaning: 'port on which rank 0 keeps the store when MASTER_PORT is taken',
    unset: 'a free one',
  },
  VIADUCT_HEARTBEAT_FILE: {
    meaning: 'file that a rank touches while it lives, set by `viaduct run`',
    unset: 'no heartbeat',
  },
  VIADUCT_TRANSPORT: { meaning: 'gloo: ranks of one host use connections too, no shared memory', unset: 'auto' },
  VIADUCT_COMM_ADDR: {
    meaning: "this host's address as other ranks reach it",
    unset: 'that of GLOO_SOCKET_IFNAME',
  },
  GLOO_SOCKET_IFNAME: {
    meaning: 'network interface by which other ranks reach this host; of several the first that is there',
    unset: 'the one on the way to MASTER_ADDR',
  },
  TORCHELASTIC_USE_AGENT_STORE: {
    meaning: "True: torchrun's agent keeps its own store on MASTER_PORT",
    unset: 'no agent',
  },
  TORCHELASTIC_RESTART_COUNT: { meaning: 'how often the launcher has restarted the ranks', unset: '0' },
  TORCHELASTIC_RUN_ID: { meaning: "the job's id", unset: 'none' },
  TORCHELASTIC_ERROR_FILE: { meaning: 'where a failing rank writes its error for the launcher', unset: 'nowhere' },
  PET_NPROC_PER_NODE: { meaning: 'default of --nproc-per-node', unset: '1' },
  PET_NNODES: { meaning: 'default of --nnodes', unset: '1' },
  PET_NODE_RANK: { meaning: 'default of --node-rank', unset: '0, or by order of arrival with an endpoint' },
  PET_MASTER_ADDR: { meaning: 'default of --master-addr', unset: '127.0.0.1' },
  PET_MASTER_PORT: { meaning: 'default of --master-port', unset: 'a free port on one node, else 29500' },
  PET_RDZV_ENDPOINT: { meaning: 'default of --rdzv-endpoint', unset: 'none' },
  PET_RDZV_ID: { meaning: 'default of --rdzv-id', unset: 'none' },
  PET_MAX_RESTARTS: { meaning: 'default of --max-restarts', unset: '0' },
  CUDA_VISIBLE_DEVICES: { meaning: 'GPUs of this process, counted by --nproc-per-node auto', unset: 'all' },
  SLURM_PROCID: { meaning: 'rank, under srun', unset: 'no srun' },
  SLURM_NTASKS: { meaning: 'number of ranks, under srun', unset: 'no srun' },
  SLURM_STEP_ID: { meaning: 'set inside of a job step, so by srun', unset: 'no srun' },
  SLURM_LOCALID: { meaning: 'rank on this node, under srun', unset: '0' },
  SLURM_NTASKS_PER_NODE: { meaning: 'ranks on each node, under srun', unset: 'see SLURM_TASKS_PER_NODE' },
  SLURM_TASKS_PER_NODE: { meaning: 'ranks on each node, e.g. 8(x2),4', unset: '1' },
  SLURM_NODEID: { meaning: 'rank of this node, under srun', unset: '0' },
  SLURM_JOB_ID: { meaning: "Slurm's job, from which the port is taken", unset: 'none' },
  SLURM_JOB_NODELIST: { meaning: 'nodes of the job; rank 0 runs on the first', unset: 'one node' },
  SLURM_RESTART_COUNT: { meaning: 'how often Slurm has requeued the job', unset: '0' },
  OMPI_COMM_WORLD_RANK: { meaning: "rank, under Open MPI's mpirun", unset: 'no Open MPI' },
  OMPI_COMM_WORLD_SIZE: { meaning: "number of ranks, under Open MPI's mpirun", unset: 'no Open MPI' },
  OMPI_COMM_WORLD_LOCAL_RANK: { meaning: "rank on this node, under Open MPI's mpirun", unset: '0' },
  OMPI_COMM_WORLD_LOCAL_SIZE: { meaning: "ranks on this node, under Open MPI's mpirun", unset: '1' },
  PMI_RANK: { meaning: 'rank, under MPICH, Intel MPI or MVAPICH', unset: 'no such launcher' },
  PMI_SIZE: { meaning: 'number of ranks, under MPICH, Intel MPI or MVAPICH', unset: 'no such launcher' },
  MPI_LOCALRANKID: { meaning: 'rank on this node, under MPICH or Intel MPI', unset: 'see MV2_COMM_WORLD_LOCAL_RANK' },
  MPI_LOCALNRANKS: { meaning: 'ranks on this node, under MPICH or Intel MPI', unset: 'see MV2_COMM_WORLD_LOCAL_SIZE' },
  MV2_COMM_WORLD_LOCAL_RANK: { meaning: 'rank on this node, under MVAPICH', unset: '0' },
  MV2_COMM_WORLD_LOCAL_SIZE: { meaning: 'ranks on this node, under MVAPICH', unset: '1' },
} as const satisfies Record<string, EnvRow>

/** Name of a declared variable. */
export type EnvName = keyof typeof rows

/** The table of all variables, for documentation and `doctor`. */
export const environment: Readonly<Record<EnvName, EnvRow>> = rows

/** The variable's text; undefined when it is not set or empty. */
export function envText(name: EnvName): string | undefined {
  const value = process.env[name]
  return value === undefined || value === '' ? undefined : value
}

/** True for 1, true, yes, on. */
export function envFlag(name: EnvName): boolean {
  return /^(1|true|yes|on)$/i.test(envText(name) ?? '')
}

/**
 * The variable as a whole number of 0 or more.
 * @throws ERR_USAGE when it is set to something else.
 */
export function envInt(name: EnvName): number | undefined {
  const text = envText(name)
  if (text === undefined) return undefined
  const value = Number(text)
  if (Number.isSafeInteger(value) && value >= 0 && /^\s*\d+\s*$/.test(text)) return value
  throw new ViaductError(
    'ERR_USAGE',
    'env',
    `expected ${name} to be a whole number, got ${JSON.stringify(text)}: correct or unset it`,
  )
}

/** The environment for a child process: this one's with `changes`; undefined takes a variable away. */
export function childEnvironment(changes: Readonly<Record<string, string | undefined>>): NodeJS.ProcessEnv {
  const env = { ...process.env }
  for (const [name, value] of Object.entries(changes)) {
    if (value === undefined) delete env[name]
    else env[name] = value
  }
  return env
}
