/* Stands in for pyxis, the container plug-in of Slurm, where there are no containers.
 *
 * It registers pyxis's options, so that real sbatch and srun accept scripts written for it, runs every task
 * on the host, and tells the task what was asked: --container-image=X becomes PYXIS_STUB_CONTAINER_IMAGE=X,
 * an option without a value becomes 1.
 */
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <slurm/spank.h>

SPANK_PLUGIN(pyxis_stub, 1)

struct option {
    const char *name;
    int takes_value;
    char *asked;
};

static struct option options[] = {
    {"container-image", 1, NULL},
    {"container-mounts", 1, NULL},
    {"container-workdir", 1, NULL},
    {"container-name", 1, NULL},
    {"container-save", 1, NULL},
    {"container-env", 1, NULL},
    {"container-mount-home", 0, NULL},
    {"no-container-mount-home", 0, NULL},
    {"container-remap-root", 0, NULL},
    {"no-container-remap-root", 0, NULL},
    {"container-entrypoint", 0, NULL},
    {"no-container-entrypoint", 0, NULL},
    {"container-entrypoint-log", 0, NULL},
    {"container-writable", 0, NULL},
    {"container-readonly", 0, NULL},
};

enum { COUNT = sizeof options / sizeof options[0] };

static int remember(int index, const char *value, int remote)
{
    (void)remote;
    free(options[index].asked);
    options[index].asked = strdup(value && *value ? value : "1");
    return 0;
}

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
    (void)argc, (void)argv;
    for (int index = 0; index < COUNT; index++) {
        int takes_value = options[index].takes_value;
        struct spank_option option = {
            .name = (char *)options[index].name,
            .arginfo = takes_value ? "VALUE" : NULL,
            .usage = "accepted, shown to the task, otherwise ignored",
            .has_arg = takes_value,
            .val = index,
            .cb = remember,
        };
        if (spank_option_register(spank, &option) != ESPANK_SUCCESS)
            return -1;
    }
    return 0;
}

/* Runs in slurmstepd, just before the task: the options have travelled with the step. */
int slurm_spank_task_init(spank_t spank, int argc, char **argv)
{
    (void)argc, (void)argv;
    for (int index = 0; index < COUNT; index++) {
        char variable[64];
        if (!options[index].asked)
            continue;
        snprintf(variable, sizeof variable, "PYXIS_STUB_%s", options[index].name);
        for (char *letter = variable; *letter; letter++)
            *letter = *letter == '-' ? '_' : (char)toupper((unsigned char)*letter);
        spank_setenv(spank, variable, options[index].asked, 1);
    }
    return 0;
}
