// The table of commands: names, arguments, flags, examples. An action loads its file in commands/ and calls it.
import { type Command, InvalidArgumentError, Option } from 'commander'
import { type DType, parseDtype } from '../base/dtype.js'
import { scheduleKinds } from '../parallel/schedules.js'
import { addLayoutFlags, positiveInt } from './layout.js'

const example = (...lines: string[]) => `\nExample:\n${lines.map((line) => `  $ ${line}`).join('\n')}`
const json = () => new Option('--json', 'print the result as JSON on stdout')
const device = () => new Option('--device <name>', 'where to compute').choices(['auto', 'cpu', 'cuda']).default('auto')
const stored: readonly DType[] = ['float32', 'bfloat16', 'float16', 'float64', 'float8_e4m3fn', 'float8_e5m2']
const computed: readonly DType[] = ['float32', 'bfloat16']
const dtype = (allowed: readonly DType[], what: string) =>
  new Option('--dtype <name>', `${what}: ${allowed.join(', ')}`).argParser((name) => {
    const found = [...allowed].find((candidate) => candidate === dtypeOf(name))
    if (found === undefined) throw new InvalidArgumentError(`expected one of ${allowed.join(', ')}.`)
    return found
  })
const overwrite = () => new Option('--overwrite', 'replace a target that is not empty')
const ignore = () =>
  new Option(
    '--ignore <pattern...>',
    'let source tensors of these names pass unread; recorded, the result is then partial',
  )
const allowMissing = () =>
  new Option('--allow-missing <pattern...>', 'let parameters of these names stay initialised; recorded as partial')
const sha256 = () => new Option('--sha256', 'record the SHA-256 of each Hugging Face tensor in conversion.json')
const noResume = () => new Option('--no-resume', 'start over instead of going on from an interrupted conversion')
const processes = (byDefault: string) =>
  new Option('--nproc-per-node <n>', `processes that share the work here (default: ${byDefault})`).argParser(
    positiveInt,
  )
const revision = () => new Option('--revision <name>', 'branch, tag or commit of a hub id')

/** The dtype of a name in any spelling, or null. */
function dtypeOf(name: string): DType | null {
  try {
    return parseDtype(name)
  } catch {
    return null
  }
}

/** Adds every command to the program. */
export function addCommands(program: Command): void {
  addConversion(program)
  addModelRuns(program)
  addTraining(program)
  addInformation(program)
}

function addConversion(program: Command): void {
  addLayoutFlags(
    program
      .command('import')
      .argument('<hf>', 'Hugging Face folder, hub id, or a checkpoint to be cut for another layout')
      .argument('<ckpt>', 'target checkpoint folder'),
  )
    .description(
      'Hugging Face folder or checkpoint to Viaduct checkpoint in any layout; resumes where it was interrupted',
    )
    .addOption(dtype(stored, 'cast floating tensors (default: as stored)'))
    .addOption(ignore())
    .addOption(allowMissing())
    .addOption(revision())
    .addOption(sha256())
    .addOption(processes('the ranks of the layout, at most 8 or the cores'))
    .addOption(noResume())
    .addOption(overwrite())
    .addOption(json())
    .addHelpText(
      'after',
      example(
        'viaduct import ./Llama-3.2-1B ./ckpt --tp 2',
        'viaduct import meta-llama/Llama-3.2-1B ./ckpt --revision main',
        'viaduct import ./ckpt ./ckpt-tp4 --tp 4',
      ),
    )
    .action(async (from, ckpt, flags) => (await import('./commands/convert.js')).importCommand(from, ckpt, flags))

  program
    .command('export')
    .argument('<ckpt>', 'checkpoint root or iter_* folder')
    .argument('<hf>', 'target Hugging Face folder')
    .description("Viaduct checkpoint to Hugging Face folder: the source's shard files and all its other files")
    .addOption(dtype(stored, 'cast floating tensors (default: as stored)'))
    .addOption(new Option('--max-shard-size <bytes>', "largest file, e.g. 5GB (default: the source's files)"))
    .option('--reference <hf>', 'rebuild the config from run_config.yaml after this folder: pruned and custom sizes')
    .addOption(sha256())
    .addOption(processes('1'))
    .addOption(noResume())
    .addOption(overwrite())
    .addOption(json())
    .addHelpText(
      'after',
      example('viaduct export ./ckpt ./out', 'viaduct export ./pruned ./out --reference ./Llama-3.2-1B'),
    )
    .action(async (ckpt, hf, flags) => (await import('./commands/convert.js')).exportCommand(ckpt, hf, flags))

  addLayoutFlags(program.command('verify').argument('<hf>', 'Hugging Face folder or hub id'))
    .description('Proves the round trip: tensor bytes, coverage both ways, config fields, logits across layouts')
    .option('--ckpt <dir>', 'compare this checkpoint with the folder')
    .option('--no-logits', "leave out the logits (the layout's ranks against one rank, float32)")
    .option('--certificate <file>', 'the full proof as JSON (default: NAME.certificate.json here)')
    .option('--no-certificate', 'write none')
    .addOption(ignore())
    .addOption(allowMissing())
    .addOption(revision())
    .addOption(json())
    .addHelpText(
      'after',
      example('viaduct verify ./Llama-3.2-1B --tp 2', 'viaduct verify ./Llama-3.2-1B --ckpt ./ckpt --json'),
    )
    .action(async (hf, flags) => (await import('./commands/verify.js')).verifyCommand(hf, flags))

  program
    .command('compare')
    .argument('<a>', 'Hugging Face folder, hub id or checkpoint')
    .argument('<b>', 'the other one')
    .description(
      'Two models side by side: tensors, config fields, files, and what each layer computes; exit 1 if they differ',
    )
    .option('--input <file>', 'safetensors with input_ids int64 [B,T] for the layers (default: seeded ids)')
    .option('--seed <n>', 'which default ids', Number, 0)
    .option('--tolerance <x>', "share of a layer's largest value by which it may differ before it diverges", Number)
    .option('--no-activations', 'leave out what the layers compute')
    .addOption(json())
    .addHelpText('after', example('viaduct compare ./Llama-3.2-1B ./ckpt', 'viaduct compare ./before ./after --json'))
    .action(async (a, b, flags) => (await import('./commands/compare.js')).compareCommand(a, b, flags))

  program
    .command('toy')
    .argument('<hf>', 'Hugging Face folder or hub id')
    .argument('<out>', 'target folder')
    .description('A small model of the first layers, every tensor as it is: for tests and trials')
    .addOption(new Option('--layers <n>', 'how many layers to keep').argParser(positiveInt).makeOptionMandatory())
    .addOption(new Option('--max-shard-size <bytes>', 'largest file, e.g. 5GB'))
    .addOption(revision())
    .addOption(overwrite())
    .addOption(json())
    .addHelpText('after', example('viaduct toy ./Qwen3-30B-A3B ./toy --layers 2'))
    .action(async (hf, out, flags) => (await import('./commands/toy.js')).toyCommand(hf, out, flags))
}

function addModelRuns(program: Command): void {
  addLayoutFlags(program.command('logits').argument('<dir>', 'Hugging Face folder, hub id or checkpoint'))
    .description('Logits, loss and gradients of given tokens, as safetensors')
    .requiredOption(
      '--input <file>',
      'safetensors: input_ids int64 [B,T]; optional attention_mask, position_ids, labels',
    )
    .requiredOption('--output <file>', 'safetensors: logits f32 [B,T,V], loss f32 [1], with --grads grad.<parameter>')
    .option('--grads', 'gradients of the mean loss, by Hugging Face parameter name')
    .addOption(dtype(computed, "compute in this dtype (default: the checkpoint's)"))
    .addOption(revision())
    .addOption(device())
    .addOption(json())
    .addHelpText(
      'after',
      example('viaduct logits ./Llama-3.2-1B --input in.safetensors --output out.safetensors --dtype float32 --tp 2'),
    )
    .action(async (dir, flags) => (await import('./commands/logits.js')).logitsCommand(dir, flags))

  addLayoutFlags(program.command('generate').argument('<dir>', 'Hugging Face folder, hub id or checkpoint'))
    .description('Continues a prompt, token by token')
    .requiredOption('--prompt <text>', 'text to continue')
    .option('--max-new-tokens <n>', 'most tokens to add', positiveInt, 64)
    .option('--temperature <t>', '0 is greedy', Number, 0)
    .option('--top-k <n>', 'sample among the k likeliest', positiveInt)
    .option('--top-p <p>', 'sample among the likeliest whose shares add up to p', Number)
    .option('--seed <n>', 'seed of the sampling', Number, 0)
    .option('--ignore-eos', 'do not stop at the end-of-sequence token')
    .addOption(dtype(computed, "compute in this dtype (default: the checkpoint's)"))
    .addOption(revision())
    .addOption(device())
    .addOption(json())
    .addHelpText(
      'after',
      example('viaduct generate ./Llama-3.2-1B --prompt "The capital of France is" --max-new-tokens 16'),
    )
    .action(async (dir, flags) => (await import('./commands/generate.js')).generateCommand(dir, flags))
}

function addTraining(program: Command): void {
  addLayoutFlags(
    program
      .command('train')
      .argument('[recipe]', 'recipe name or FILE.yaml')
      .argument('[overrides...]', 'key=value, e.g. train.train_iters=10'),
  )
    .description('Trains a recipe; recipe < YAML < flags < overrides')
    .option('--hf <dir>', 'model and weights from a Hugging Face folder or hub id')
    .addOption(new Option('--mode <mode>', 'kind of training').choices(['pretrain']).default('pretrain'))
    .option('--data <path>', 'text file or folder to train on')
    .option('--tokenizer <dir>', 'folder with tokenizer.json (default: the --hf folder)')
    .option('--save <dir>', 'checkpoint folder; training resumes from it if it holds one')
    .option('--load <dir>', 'checkpoint to start from, unless --save holds one')
    .addOption(
      new Option(
        '--recompute-granularity <what>',
        'what runs again in the backward pass instead of being kept: whole layers, or the modules named',
      ).choices(['full', 'selective']),
    )
    .addOption(
      new Option(
        '--recompute-method <how>',
        'full: layers in groups, of which the input is kept, or the first ones of each chunk',
      ).choices(['uniform', 'block']),
    )
    .option('--recompute-num-layers <n>', 'full: layers of a group (uniform) or of a chunk (block)', positiveInt)
    .option('--recompute-modules <names>', 'selective: of core_attn,layernorm,mlp_act,mlp,moe (default: core_attn)')
    .option('--cpu-offloading-num-layers <n>', 'layers whose activations wait in host memory', positiveInt)
    .option('--fsdp', 'shard weights, gradients and optimizer over data-parallel ranks (ddp.use_megatron_fsdp)')
    .option('--optimizer-cpu-offload', 'keep optimizer state in host memory and update there')
    .option('--optimizer-offload-fraction <f>', 'share of the optimizer that the host takes (default: 1)', Number)
    .option('--nproc-per-node <n>', 'ranks to start here', positiveInt)
    .option(
      '--max-restarts <n>',
      'after a failure go on from the last checkpoint of --save, at most so often',
      positiveInt,
    )
    .addOption(revision())
    .option('--dry-run', 'print the resolved config and the price, start nothing')
    .addOption(device())
    .addOption(json())
    .addHelpText(
      'after',
      example(
        'viaduct train llama_tiny_cpu_pretrain_config --data ./docs --save ./ckpt --tp 2',
        'viaduct train --hf ./Llama-3.2-1B --data ./text train.train_iters=10',
      ),
    )
    .action(async (recipe, overrides, flags) =>
      (await import('./commands/train.js')).trainCommand(recipe, overrides, flags),
    )

  addLayoutFlags(
    program
      .command('plan')
      .argument('[recipe]', 'recipe name or FILE.yaml; without one: a schedule alone')
      .argument('[overrides...]', 'key=value, e.g. train.micro_batch_size=2'),
  )
    .description(
      'A run before it starts: bytes on each pipeline stage; its schedule, or one of given sizes, as a picture',
    )
    .option('--hf <dir>', 'the model of a Hugging Face folder or hub id')
    .addOption(revision())
    .addOption(
      new Option('--schedule <kind>', 'which one (default: 1f1b, interleaved with --vpp)').choices([...scheduleKinds]),
    )
    .option('--micro-batches <n>', 'of a schedule alone: micro-batches a step', positiveInt)
    .option(
      '--group-size <n>',
      'interleaved: micro-batches that pass a chunk before the next (default: --pp)',
      positiveInt,
    )
    .option(
      '--costs <f,b,w[,send]>',
      "times of a stage's forward, input and weight gradients, and of a transfer",
      '1,1,1',
    )
    .option('--svg <file>', 'draw the timeline')
    .addOption(json())
    .addHelpText(
      'after',
      example(
        'viaduct plan llama_tiny_cpu_pretrain_config --pp 3 train.micro_batch_size=1',
        'viaduct plan --hf ./Llama-3.2-1B --pp 4 model.recompute_granularity=full',
        'viaduct plan --schedule 1f1b --pp 4 --micro-batches 8 --svg 1f1b.svg',
      ),
    )
    .action(async (recipe, overrides, flags) =>
      (await import('./commands/plan.js')).planCommand(recipe, overrides, flags),
    )

  const run = program
    .command('run')
    .description("Starts a script on several ranks; torchrun's flags")
    .argument('<script>', '.ts, .js or .mjs file; with --no-python any program')
    .argument('[args...]', 'arguments of the script')
    .option('--nproc-per-node <n>', 'ranks on this node: a number, auto, gpu or cpu (default: 1)')
    .option('--nnodes <n>', 'number of nodes (default: 1)')
    .option('--node-rank <n>', 'this node, 0 to nnodes - 1')
    .option('--master-addr <host>', 'address of node 0')
    .option('--master-port <port>', 'port of the store on node 0')
    .option('--rdzv-endpoint <host:port>', 'address and port of node 0 in one')
    .option('--rdzv-backend <name>', 'c10d or static; both mean the same here')
    .option('--rdzv-id <id>', 'name of the job')
    .option('--rdzv-conf <settings>', 'join_timeout=S: time for all nodes to come, or to come back (default: 600)')
    .option('--standalone', 'one node, a free port')
    .option('--max-restarts <n>', 'restarts of all ranks after a failure (default: 0)')
    .option('--monitor-interval <s>', "taken for torchrun's sake: deaths are noticed at once")
    .option('--shutdown-timeout <s>', 'time for ranks to end after a signal (default: 30)')
    .option('--heartbeat-timeout <s>', 'a rank or node silent for so long has failed; 0: never (default: 60)')
    .option('--log-dir <dir>', "also write each rank's output to files there")
    .option('--redirects <n>', 'streams that go to files only: 0 to 3, or 0:1,1:3 by local rank')
    .option('--tee <n>', 'streams that go to files as well')
    .option('--local-ranks-filter <ranks>', 'local ranks whose output is shown, e.g. 0,1')
    .option('--no-python', 'SCRIPT is a program, not a script')
    .passThroughOptions()
    .addHelpText('after', example('viaduct run --nproc-per-node 2 examples/pretrain.ts'))
    .action(async (script, args, flags) => (await import('./commands/run.js')).runCommand(script, args, flags))
  // torchrun takes underscores too.
  for (const { long, flags } of [...run.options]) {
    const name = long?.slice(2) ?? ''
    if (name.includes('-') && name !== 'no-python')
      run.addOption(new Option(flags.replace(name, name.replaceAll('-', '_'))).hideHelp())
  }
}

function addInformation(program: Command): void {
  program
    .command('models')
    .description('Architectures that convert, train and generate')
    .addOption(json())
    .addHelpText('after', example('viaduct models'))
    .action(async (flags) => (await import('./commands/information.js')).modelsCommand(flags))
  program
    .command('recipes')
    .description('Ready configurations for `viaduct train`')
    .addOption(json())
    .addHelpText('after', example('viaduct recipes --json'))
    .action(async (flags) => (await import('./commands/information.js')).recipesCommand(flags))
  program
    .command('doctor')
    .description('What this machine has, what is in use, what is missing')
    .addOption(json())
    .addHelpText('after', example('viaduct doctor'))
    .action(async (flags) => (await import('./commands/doctor.js')).doctorCommand(flags))
}
